"""The perplexity of a model in which one weight alone is truncated, at each share of a grid: ASVD's sensitivities."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.evidence.base import Measurement
from twofold.host.cache import cache_folder
from twofold.host.files import write_text
from twofold.host.progress import progress, say
from twofold.linalg.gauge import gauge_rank
from twofold.linalg.spectrum import truncate
from twofold.model.frozen import frozen
from twofold.model.target import Target
from twofold.task import Samples, Task
from twofold.task.output.quality import Predict, measure_quality


class _Table(pydantic.BaseModel, extra="forbid", ser_json_inf_nan="constants"):
    """Perplexities by the name of the weight, in the order of the grid, and what they belong to; kept in the cache."""

    mark: str
    perplexities: dict[str, list[float]] = {}

    @classmethod
    def of(cls, work: Measurement, grid: Sequence[float], windows: int) -> _Table:
        """Take up what an earlier run, or one that was stopped, has measured."""
        assert work.samples is not None
        settings = work.settings
        way = [settings.form, settings.dtype, settings.device, list(grid)]
        mark = json.dumps([work.decomposition.spectra.mark, work.samples.sha256, windows, *way])
        table = cls(mark=hashlib.sha256(mark.encode()).hexdigest())
        with contextlib.suppress(OSError, ValueError):  # there is none, or it can't be read
            earlier = cls.model_validate_json(table.path.read_text(encoding="utf-8"))
            if earlier.mark == table.mark and all(len(row) == len(grid) for row in earlier.perplexities.values()):
                return earlier
        return table

    @property
    def path(self) -> Path:
        return cache_folder() / "sensitivity" / f"{self.mark[:24]}.json"

    def keep(self) -> bool:
        """Write the table for another run; say so if the disk does not take it. Return whether it did."""
        try:
            write_text(self.path, self.model_dump_json())
            return True
        except TwofoldError as error:
            say(f"the sensitivities are not kept for another run: {error}")
            return False


@torch.no_grad()
def perplexities(
    work: Measurement, grid: Sequence[float], windows: int
) -> dict[str, NDArray[np.float64]]:  # (grid,) of each weight
    """Measure every weight at every share of the grid; one forward pass over some windows each."""
    assert work.samples is not None and work.task is not None
    table, samples, task = _Table.of(work, grid, windows), work.samples[:windows], work.task
    model, known = work.model, table.perplexities
    missing = [target for target in work.targets if target.name not in known]
    total, done = len(work.targets) * len(grid), (len(work.targets) - len(missing)) * len(grid)
    writable = True

    def predict(i: int) -> Tensor:
        return task.outputs(model, samples.batch(i, i + 1))

    with (
        frozen(model),
        progress("Truncating one weight at a time", total, done=done, unit="measurements", quiet=work.quiet) as tick,
    ):
        for target in missing:
            module = model.get_submodule(target.name)
            problem, spectrum, weight = work.decomposed(target)
            row = []
            for rank in [_rank_within(target, share, work.settings.form) for share in grid]:
                left, right = truncate(weight, spectrum, problem.metric, rank)
                truncated = (left @ right).to(weight)
                values = {"weight": (truncated.T if target.transposed else truncated).contiguous()}
                if problem.mean is not None:
                    values["bias"] = module.bias + (weight - truncated) @ problem.mean.to(weight)
                row.append(_perplexity(module, values, predict, samples, task))
                tick()
            known[target.name] = row
            writable = writable and table.keep()
    return {target.name: np.array(known[target.name]) for target in work.targets}


def _rank_within(target: Target, share: float, form: str) -> int:
    """Return the largest rank that stores at most a share of a weight; at least 1."""
    m, n = target.out_features, target.in_features
    allowed = share * target.size * (1 + 1e-9)
    return max(int(allowed / (m + n)) if form == "plain" else gauge_rank(m, n, allowed), 1)


def _perplexity(module: nn.Module, values: dict[str, Tensor], predict: Predict, samples: Samples, task: Task) -> float:
    """Return the perplexity with other values in a layer's parameters, which then get their own back."""
    own = {name: module.get_parameter(name).data for name in values}
    for name, value in values.items():
        module.get_parameter(name).data = value
    try:
        quality = measure_quality([predict], samples, task, quiet=True)[0]
    finally:
        for name, value in own.items():
            module.get_parameter(name).data = value
    perplexity = quality.perplexity
    return math.inf if perplexity is None or math.isnan(perplexity) else perplexity
