"""The time of a run, stage by stage, from the speeds that a probe has measured."""

from __future__ import annotations

import time

import torch

from twofold.allocate import ALLOCATIONS
from twofold.model.load import LoadedModel
from twofold.objectives import OBJECTIVES
from twofold.recipe import Recipe
from twofold.refine import REFINEMENTS
from twofold.run.estimate.memory import price_of
from twofold.settings.price import Figures, Speeds

READ = 5e8  # bytes a second from a disk that is not known
HASHED = 8e8  # bytes a second, read and hashed
WRITTEN = 3e8  # bytes a second
MOVED = 8e9  # bytes a second of weights that are read from memory to write one token
SAMPLE_STEPS = 128  # tokens of the sample answers of both models
SAMPLING = 3.5  # time of a sampled token over that of one that is read


def seconds_of(f: Figures, s: Speeds, recipe: Recipe, blocks: int | None, bytes_a_second: float) -> dict[str, float]:
    """Return the time of each stage."""
    objective, price = OBJECTIVES.get(recipe.objective), price_of(f, recipe, s)
    count, stored = price.blocks, f.numbers * f.stored
    sweeps = 1.0
    again = 0 if blocks is None else count - min(blocks, count)  # blocks that are computed once more
    if f.backward:
        calibrate = price.batches * (count * s.both + again * s.forward + s.head)
        sweeps += again / count
    else:
        calibrate = price.batches * count * s.forward
    windows = recipe.eval_windows
    window = s.forward * recipe.window / s.batch
    seconds = {
        "load": stored / bytes_a_second + 3,  # the libraries among it
        "hash": stored / HASHED,
        "calibrate": calibrate if objective.needs else 0.0,
        "decompose": count * s.decompose,
        "factorize": count * s.factorize,
        "measure": 2 * windows * (count * window + s.head_forward),
        "write and report": 4 + stored / WRITTEN,
    }
    allocation = ALLOCATIONS.get(recipe.allocate)
    if allocation.seconds is not None:
        seconds["recalibrate" if allocation.again else "sensitivities"] = allocation.seconds(price, recipe)
    if recipe.refine and blocks is None:
        total = sum(REFINEMENTS.get(name).seconds(price, recipe) for name in recipe.refine)
        seconds["refine"] = total if recipe.minutes is None else min(total, 60 * recipe.minutes)
    written = recipe.continuations
    if recipe.calibration == ["self"]:
        written = recipe.tokens + recipe.held_out_windows * recipe.window
    if written and objective.needs:
        seconds["texts"] = written / s.batch * count * s.forward * SAMPLING
    if blocks is None:
        seconds["samples"] = SAMPLE_STEPS * f.numbers * f.element / MOVED
    else:
        reads = sweeps * (f.backward or bool(objective.needs)) + 2 + 1.6 * bool(windows)
        seconds["read blocks"] = reads * stored / bytes_a_second
        seconds["load"] = 3.0
    return seconds


def read_speed(loaded: LoadedModel) -> float:
    """Time how many bytes a second weights are read and cast at, on the first file of the model; a guess without one."""
    path = next(iter(sorted(loaded.source.glob("*.safetensors"))), None) if loaded.source is not None else None
    if path is None:
        return READ
    start = time.perf_counter()
    with path.open("rb") as file:
        part = file.read(64_000_000)
    if len(part) < 1_000_000:
        return READ
    numbers = torch.frombuffer(bytearray(part[: len(part) // 2 * 2]), dtype=torch.bfloat16)
    torch.isfinite(numbers.to(torch.float32)).all()
    return len(part) / (time.perf_counter() - start)
