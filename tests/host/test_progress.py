"""What a log gets of long work, how times are written, and what other libraries' bars leave in it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from tqdm.auto import tqdm

from twofold.host import progress as shown
from twofold.host.progress import AT_ONCE, LOG, REST_SECONDS, Log, duration, progress
from twofold.host.quiet import quiet_bars
from twofold.run.estimate.busy import Busy, watch_processors


class Clock:
    """A clock that is put forward by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(shown.time, "monotonic", clock)
    LOG.set(Log())
    yield clock
    LOG.set(Log())


def test_many_short_stages_take_one_line_in_ten_seconds_at_most(clock, capsys):
    for _ in range(1000):
        with progress("Short", total=1) as tick:
            clock.now += 1
            tick()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["Short …", "Short: done in 1.0 s"]
    assert AT_ONCE < len(lines) <= AT_ONCE + 1000 / REST_SECONDS + 1


def test_a_long_stage_tells_how_far_it_is_and_its_end(clock, capsys):
    for _ in range(100):  # nothing is left of the lines at once
        with progress("Short", total=1) as tick:
            tick()
    capsys.readouterr()
    with progress("Long", total=600, unit="steps") as tick:
        for _ in range(600):
            clock.now += 1
            tick()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "Long: done in 10 min"
    assert "Long: 300/600 steps, 5 min left" in lines
    assert len(lines) <= 600 / REST_SECONDS


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.034, "0.03 s"), (14.49, "14.5 s"), (119.9, "119.9 s"), (119.97, "2 min"), (121, "2 min"), (3599, "1 h 0 min")],
)
def test_times_are_in_minutes_past_two_of_them(seconds, words):
    assert duration(seconds) == words


def test_a_bar_that_no_setting_turns_off_is_left_out(capsys):
    with quiet_bars():
        for _ in tqdm(range(3), desc="Converting", mininterval=0):
            print("a warning", file=sys.stderr)
        print("the last word", file=sys.stderr)
    assert capsys.readouterr().err == "a warning\n" * 3 + "the last word\n"


def test_what_others_take_of_the_processors_is_seen():
    with watch_processors() as before:
        pass
    spin = "print(flush=True)\nwhile True: pass"
    others = [
        subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(min(before.processors, 4))
    ]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        with watch_processors() as busy:
            time.sleep(0.5)
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert busy.others > 0.5 and busy.own < 0.3 < busy.wall


def test_a_machine_with_room_for_both_is_not_disturbed():
    crowded, roomy = (Busy(processors, threads=2, wall=10.0, own=8.0, others=1.5) for processors in (2, 8))
    assert crowded.disturbed and not roomy.disturbed
    assert crowded.shortening == pytest.approx(0.4)
