"""What a run promises whatever happens: all is escaped, no secret is told, and a full disk or Ctrl-C leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

import twofold.cli
from conftest import TEXT
from pages import front_matter, make_plan, make_run, page
from runs import Program
from twofold.cli import compress, plan, tables
from twofold.host.cache import cache_folder
from twofold.host.folders import staged_folder
from twofold.report.card import write_card
from twofold.report.record import Sample

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz012345",
    "HUGGING_FACE_HUB_TOKEN": "hf_zyxwvutsrqponmlkjihgfedcba543210",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "OPENAI_API_KEY": "sk-of-nobody-0123456789",
}
HOSTILE = (
    "<script>alert(1)</script>",
    "`x` | a | ``` <img src=x onerror=alert(1)>",
    "\n\n# head\n\n| a | b |\n| - | - |\n\n---\nlicense: mine\n---\n",
    "[click](javascript:alert(1)) ![x](http://example.org/x.png) **b** ~~s~~ $x$",
    "</pre></code></table><iframe src=//example.org>",
    "````\n<script>alert(1)</script>\n````",
    "\\`\\|\\<script>",
)


@pytest.fixture
def command(checkpoint, text_file, tmp_path):
    """A quick run."""
    return [
        "compress", checkpoint, "--calibration", text_file, "--tokens", 96, "--window", 32, "--keep", 0.5,
        "--out", tmp_path / "small",
    ]  # fmt: skip


def run(command, capsys, monkeypatch) -> tuple[int, str, str]:
    """Run the command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["twofold", *map(str, command)])
    with pytest.raises(SystemExit) as stopped:
        twofold.cli.main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def left_behind(folder: Path) -> list[str]:
    """What is there beside what the test put there, and the state that the same command goes on from (``twofold status``)."""
    ours = ("tiny", "texts.txt", "cache", "small.partial")
    assert not list(folder.glob("small.partial/**/.*"))  # and no half-written file in it
    return sorted(path.name for path in folder.iterdir() if path.name not in ours)


# --- Escaping


@pytest.mark.whole
@pytest.mark.parametrize("text", HOSTILE)
def test_the_page_and_the_card_say_hostile_words_and_obey_none(text, tmp_path):
    names = [(f"model.layers.{i}.{text}", i) for i in range(2)]
    plan, spectra = make_plan(model=text, names=names, notes=[text])
    samples = [Sample(prompt=text, original=text, factored=text)]
    run = make_run(
        plan, samples=samples, model=text, exclude=[text], calibration=[text], text_column=text, revision=text
    )
    run = run.model_copy(update={"calibration": text, "notes": [text]})
    page(tmp_path, run, plan, spectra)  # no script, no address, every element closed
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [text]}))
    write_card(tmp_path, run, plan)
    matter, body = front_matter(tmp_path)
    assert set(matter) <= {"base_model", "library_name", "pipeline_tag", "tags"}
    assert "base_model" not in matter
    before, fence, rest = body.partition("```yaml\n")
    mark = before[len(before.rstrip("`")) :] + fence.partition("yaml")[0]  # the fence is longer than any in the recipe
    recipe, _, after = rest.partition(f"\n{mark}\n")
    assert yaml.safe_load(recipe)["exclude"] == [text]
    outside = before.partition("```python")[0] + after
    assert "<" not in outside
    obeyed = re.sub(r"\\.", "", outside)  # without what is escaped
    for sign in ("](", "| a |", "**", "~~", "$", "```"):
        assert sign not in obeyed
    headings = [line for line in (before + after).splitlines() if line.startswith("#") and "import" not in line]
    assert [line.partition(" ")[2] for line in headings if line.startswith("## ")] == [
        "How to load it", "Size", "Quality", "How it was made", "Limits",
    ]  # fmt: skip
    assert sum(line.startswith("# ") for line in headings) == 1


def test_the_terminal_shows_hostile_words_and_obeys_none(tmp_path, monkeypatch):
    """Markup that rich would fail on, and the escape sequences of a terminal."""
    shown = io.StringIO()
    console = Console(file=shown, width=200, force_terminal=True, color_system=None)
    monkeypatch.setattr(tables, "console", console)
    text = "[/b] [bold]x[/bold] \x1b]0;title\x07 \x1b[2J \x9b31m end\\"
    names = [("model.layers.0.[/b]", 0), ("model.layers.1.\x1b[2J", 1)]
    made, _ = make_plan(model=f"models/{text}", names=names, notes=[text])
    run = make_run(made, samples=[Sample(prompt=text, original=text, factored=text)])
    assert run.quality is not None
    run = run.model_copy(update={"notes": [text], "quality": run.quality.model_copy(update={"text": text})})
    plan.print_plan(made)
    compress.print_run(run, made, Path("out[/b]"))
    written = shown.getvalue()
    assert "[bold]x[/bold]" in written
    for sign in ("\x1b]", "\x1b[2J", "\x07", "\x9b"):
        assert sign not in written


# --- Secrets


@pytest.mark.whole
@pytest.mark.long
def test_no_secret_is_told(command, capsys, monkeypatch, tmp_path):
    """Tokens of the environment stand in no file and no line, whether the run succeeds, is refused or fails."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    told = ""
    for more, expected in (
        (["--json"], 0),
        (["--overwrite"], 0),
        ([], 2),
        (["--overwrite", "--device", "abacus"], 2),
    ):
        code, out, err = run([*command, *more], capsys, monkeypatch)
        assert code == expected, err
        told += out + err
    monkeypatch.setattr("twofold.run.prepare.targets_of", lambda *a: 1 / 0)
    code, out, err = run([*command, "--overwrite"], capsys, monkeypatch)
    assert code == 1
    told += out + err
    for folder in (tmp_path / "small", cache_folder()):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files
        told += "".join(path.read_bytes().decode("latin-1") for path in files)
    assert "report.html" in {path.name for path in (tmp_path / "small").iterdir()}
    for secret in SECRETS.values():
        assert secret not in told


# --- A full disk


@pytest.mark.long
@pytest.mark.whole  # some of the sizes are reached by the page with its figures
@pytest.mark.parametrize("size", [1_000, 20_000, 60_000, 100_000])
def test_a_write_that_breaks_off_leaves_nothing(size, command, capsys, monkeypatch, tmp_path):
    """No file may grow beyond this size: the write of the weights breaks off in the middle, as on a full disk."""
    svd = [*command, "--objective", "svd", "--allocate", "uniform", "--quiet", "--eval-windows", "0"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code, out, err = run(svd, capsys, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and out == "", err
    assert err.startswith(f"twofold: no space left while writing {tmp_path}") and err.count("\n") == 1
    assert left_behind(tmp_path) == []
    assert run(svd, capsys, monkeypatch)[0] == 0  # with room it goes on as if nothing had happened


ON_A_SMALL_DISK = """
import sys
import twofold.cli, twofold.host.folders, twofold.run.compress as compression
compression.check_space = lambda *a: None  # as if the disk had filled after it was asked
sys.argv = ["twofold", *sys.argv[1:]]
twofold.cli.main()
"""


def small_disk(size: str, folder: Path, rest: list[str]) -> list[str]:
    """A command in a namespace of its own, where ``folder`` is a disk of this size."""
    mount = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && exec \"$@\""
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *rest]


@pytest.mark.slow
def test_a_disk_that_fills_while_the_checkpoint_is_written(command, tmp_path):
    size = "80k"  # less than the weights
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here, so no small disk can be made")
    probe = subprocess.run(small_disk(size, disk, ["true"]), capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no small disk can be mounted here: {probe.stderr.strip()[:100]}")
    full = [*command[:-1], disk / "small", "--quiet", "--eval-windows", 0]
    listing = f"\"$@\"; code=$?; ls -A '{disk}'; exit $code"
    python = [sys.executable, "-c", ON_A_SMALL_DISK, *map(str, full)]
    done = subprocess.run(
        small_disk(size, disk, ["sh", "-c", listing, "sh", *python]),
        capture_output=True, text=True, env={**os.environ, "TWOFOLD_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"twofold: no space left while writing {disk / 'small'}")
    assert done.stderr.count("\n") == 1
    assert done.stdout.split() in ([], ["small.partial"]), (
        "nothing but the state that the same command goes on from is left"
    )


# --- Ctrl-C


def test_stopped_as_soon_as_the_folder_is_there_nothing_stays(tmp_path, monkeypatch):
    make = Path.mkdir

    def make_and_stop(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.suffix == ".partial":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", make_and_stop)
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "small"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("moment", ["calibrating", "writing"])
def test_ctrl_c_ends_in_one_sentence_and_leaves_nothing(moment, command, tmp_path):
    """While it calibrates (a moment file is open) and while it writes (the staging folder is there)."""
    cache = tmp_path / "cache"
    long = [*command, "--tokens", 400_000] if moment == "calibrating" else command
    (tmp_path / "texts.txt").write_text(TEXT * 300, encoding="utf-8")
    program = Program(long, cache)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and program.process.is_alive():
        if "Calibrating" in program.told if moment == "calibrating" else list(tmp_path.glob(".small.*.partial")):
            break
        time.sleep(0.002)
    assert program.process.is_alive(), program.told
    program.send(signal.SIGINT)
    done = program.wait()
    told = done.stderr
    assert done.returncode == 130, told
    assert done.stdout == ""
    assert "Traceback" not in told
    sentences = [line for line in told.splitlines() if line.startswith("twofold: ")]
    assert sentences == ["twofold: stopped; the same command goes on from what was done"]
    assert left_behind(tmp_path) == []
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.long
def test_what_was_there_stays_when_a_write_breaks_off(command, capsys, monkeypatch, tmp_path):
    """--overwrite: the old checkpoint is there until the new one is whole."""
    assert run([*command, "--quiet"], capsys, monkeypatch)[0] == 0
    weights = tmp_path / "small" / "model.safetensors"
    save_file({**load_file(weights)}, tmp_path / "copy", {"format": "pt"})
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("twofold.report.card.write_card", stop)
    assert run([*command, "--quiet", "--overwrite"], capsys, monkeypatch)[0] == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == before
    assert left_behind(tmp_path) == ["copy", "small"]
