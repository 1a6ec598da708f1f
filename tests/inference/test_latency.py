"""The table of measured times, and budgets in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import twofold
from conftest import make_model
from twofold import TwofoldError
from twofold.cli import app
from twofold.inference import latency
from twofold.inference.latency import DECODE, PREFILL, Latencies, Table, Times, measured_ranks, time_shape, times_of
from twofold.model.weights import list_weights
from twofold.recipe import Recipe, make_recipe
from twofold.run.plan import plan as plan_of


def made_up(m: int, n: int, form: str, tokens: int) -> Times:
    """Dense is m n / 100 µs; factored 4 µs for its calls and its numbers at the same rate, so that small layers are slower."""
    ranks = measured_ranks(m, n, form)  # type: ignore[arg-type]
    return Times(dense=m * n / 100, ranks=ranks, factored=[4 + r * (m + n - r) / 100 for r in ranks])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Measured times that are always the same; the shapes that were measured."""
    asked: list[tuple[int, int]] = []

    def take(m: int, n: int, ranks: list[int], tokens: int, form: str = "gauge", **_: Any) -> Times:
        asked.append((m, n))
        return made_up(m, n, form, tokens)

    monkeypatch.setattr(latency, "time_shape", take)
    monkeypatch.setattr(latency, "columns_pay", lambda dtype, device: False)
    return asked


@pytest.mark.long
def test_a_shape_is_really_measured() -> None:
    small = time_shape(64, 48, [4, 24], DECODE, by_columns=False)
    assert small.ranks == [4, 24] and len(small.factored) == 2 and min(small.dense, *small.factored) > 0
    large = time_shape(512, 512, [16], PREFILL)
    assert large.factored[0] < large.dense  # a sixteenth of the multiplications


def test_times_between_ranks_and_what_is_slower() -> None:
    table = Latencies(Table(about={}, by_columns=False), torch.float32, torch.device("cpu"), quiet=True, take=made_up)
    ranks = measured_ranks(64, 48, "gauge")
    assert ranks[0] == 1 and ranks[-1] == 48 and ranks == sorted(set(ranks))
    exact = made_up(64, 48, "gauge", 1)
    assert np.allclose(table.factored(64, 48, ranks), exact.factored)
    between = table.factored(64, 48, [(ranks[1] + ranks[2]) / 2])[0]
    assert np.isclose(between, (exact.factored[1] + exact.factored[2]) / 2)
    assert table.slower(64, 48, 8) is None
    words = table.slower(64, 48, 48)
    assert words is not None and "µs at rank 48" in words and "one token" in words
    many = table.slower(64, 48, 48, counts=[512])
    assert many is not None and "512 tokens" in many


def test_interpolated_times_never_fall() -> None:
    def noisy(m: int, n: int, form: str, tokens: int) -> Times:
        return Times(dense=10, ranks=[1, 8, 16], factored=[3, 2, 5])

    table = Latencies(Table(about={}, by_columns=False), torch.float32, torch.device("cpu"), quiet=True, take=noisy)
    assert table.factored(16, 16, [1, 8, 16]).tolist() == [3, 3, 5]


def test_the_table_is_kept_and_belongs_to_its_machine(clock: list[tuple[int, int]]) -> None:
    Latencies.of_this_machine(quiet=True).measure([(32, 16), (32, 16), (16, 16)])
    assert clock == [(32, 16), (32, 16), (16, 16), (16, 16)]  # each for one token and for many
    again = Latencies.of_this_machine(quiet=True)
    again.measure([(32, 16), (16, 16)])
    assert len(clock) == 4
    other = Latencies.of_this_machine(torch.float64, quiet=True)
    other.measure([(32, 16)], tokens=[DECODE])
    assert len(clock) == 5 and other.path != again.path
    assert again.path is not None
    again.path.write_text("{", encoding="utf-8")  # damaged: measured again
    Latencies.of_this_machine(quiet=True).measure([(16, 16)], tokens=[DECODE])
    assert len(clock) == 6


def test_a_plan_within_a_share_of_the_time(clock: list[tuple[int, int]], checkpoint: Path, text_file: Path) -> None:
    settings: dict[str, Any] = {"calibration": [str(text_file)], "tokens": 512, "window": 64, "min_rank": 1}
    recipe = Recipe(model=str(checkpoint), latency=0.8, **settings)
    plan = plan_of(recipe, quiet=True)
    assert plan.latency is not None and 0.75 < plan.latency <= 0.8
    for entry in plan.entries:
        assert entry.microseconds is not None and entry.dense_microseconds is not None
        assert entry.microseconds <= entry.dense_microseconds
        if entry.rank is not None:
            assert entry.rank % 8 == 0
    small = [entry for entry in plan.entries if entry.out_features == 16]  # 5.12 µs dense, 7.2 at rank 8
    assert small and all(entry.rank is None for entry in small)
    assert all("measured slower at every rank (7 µs at rank 8, dense 5 µs)" in entry.reason for entry in small)
    assert any("measured on" in note for note in plan.notes)
    whole = plan_of(recipe.model_copy(update={"latency": 1.0}), quiet=True)
    assert whole.target_after == whole.target_before  # all dense: nothing is lost


def test_layers_that_are_slower_at_every_rank_stay_dense_and_say_so(
    checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(m: int, n: int, ranks: list[int], tokens: int, form: str = "gauge", **_: Any) -> Times:
        slow = 2.0 if m == n else 0.2
        return Times(dense=10, ranks=[1, min(m, n)], factored=[10 * slow, 12 * slow])

    monkeypatch.setattr(latency, "time_shape", take)
    monkeypatch.setattr(latency, "columns_pay", lambda dtype, device: False)
    recipe = Recipe(model=str(checkpoint), latency=0.7, calibration=[str(text_file)], tokens=512, window=64)
    plan = plan_of(recipe, quiet=True)
    square = [entry for entry in plan.entries if entry.out_features == entry.in_features]
    assert square and all(entry.rank is None and "measured slower at every rank" in entry.reason for entry in square)
    assert any(f"{len(square)} weights are slower at every rank" in note for note in plan.notes)
    assert any(entry.rank is not None for entry in plan.entries)
    with pytest.raises(
        TwofoldError, match=r"`latency=0\.2` can't be met on this machine: the smallest possible is 0\.4"
    ):
        plan_of(recipe.model_copy(update={"latency": 0.2}), quiet=True)


def test_uniform_ranks_from_the_configuration_alone(clock: list[tuple[int, int]], checkpoint: Path) -> None:
    plan = plan_of(Recipe(model=str(checkpoint), latency=0.9), estimate=False, quiet=True)
    assert plan.latency is not None and plan.latency <= 0.9 and plan.allocate == "uniform"


@pytest.mark.long
def test_compress_by_time_on_the_command_line(clock: list[tuple[int, int]], checkpoint: Path, text_file: Path) -> None:
    out = checkpoint.parent / "small"
    flags = ["--calibration", str(text_file), "--tokens", "512", "--window", "64", "--out", str(out), "--quiet"]
    done = CliRunner().invoke(app, ["compress", str(checkpoint), "--latency", "0.8", *flags])
    assert done.exit_code == 0, done.output
    plan = twofold.Plan.load(out / "plan.json")
    assert plan.latency is not None and plan.latency <= 0.8
    assert "latency: 0.8" in (out / "recipe.yaml").read_text()
    assert "time for one token" in done.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latency": 0.5, "keep": 0.5}, "only one of them"),
        ({"latency": 0.0}, "`latency`"),
        ({"latency": 1.5}, "`latency`"),
        (
            {"latency": 0.8, "objective": "modegpt"},
            "`latency=0.8` treats each weight alone, and `objective=modegpt` cuts weights together; give `keep`",
        ),
    ],
)
def test_what_does_not_go_together(
    settings: dict[str, Any], words: str, checkpoint: Path, clock: list[tuple[int, int]]
) -> None:
    with pytest.raises(TwofoldError, match=words):
        twofold.factorize(str(checkpoint), quiet=True, **settings)


def test_times_of_targets_are_those_of_their_shapes(clock: list[tuple[int, int]]) -> None:
    targets = list_weights(make_model()).targets
    times, words = times_of(targets, "gauge", torch.float32, torch.device("cpu"), quiet=True)
    assert set(times) == {target.name for target in targets}
    assert words == Latencies.of_this_machine(quiet=True).words
    assert len(clock) == len({(t.out_features, t.in_features) for t in targets})
    first = targets[0]
    assert np.isclose(times[first.name].dense, first.size / 100)


def test_a_stored_recipe_aligns_ranks_as_the_first_run_did():
    recipe = make_recipe({"model": "m", "latency": 0.6})
    again = make_recipe(yaml.safe_load(recipe.to_yaml()))
    assert recipe.aligned == again.aligned == 8
    assert make_recipe({"model": "m", "latency": 0.6, "rank_multiple": 1}).aligned == 1
    assert make_recipe({"model": "m", "keep": 0.6}).aligned == 1
