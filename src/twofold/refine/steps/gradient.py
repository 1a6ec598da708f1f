"""The gradient of a job's loss by every whole weight, and the moments of both sides of it, by two halves of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.host.folders import check_space
from twofold.host.parts import Parts, read_names, write_part
from twofold.host.progress import progress
from twofold.model.kinds import Sink, Taker, watch
from twofold.refine.steps.job import Job
from twofold.refine.steps.likeness import Likeness


@dataclass
class Sums:
    """What one run over half of the windows adds up, by layer; those with one input have one moment of it."""

    gradients: dict[str, Tensor] = field(default_factory=dict)  # Σ g xᵀ (m, n)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # Σ g gᵀ (m, m)
    inputs: dict[str, Tensor] = field(default_factory=dict)  # leader → Σ x xᵀ (n, n)
    rows: dict[str, Tensor] = field(default_factory=dict)  # leader → how many inputs it was given

    def tensors(self) -> dict[str, Tensor]:
        """All by the names that they have on disk."""
        kinds = {"gradient": self.gradients, "output": self.outputs, "input": self.inputs, "rows": self.rows}
        return {f"{kind}/{name}": tensor for kind, some in kinds.items() for name, tensor in some.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Sums:
        sums = cls()
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            owner = {"gradient": sums.gradients, "output": sums.outputs, "input": sums.inputs, "rows": sums.rows}[kind]
            owner[name] = tensor
        return sums


def sum_half(job: Job, loss: Likeness, names: list[str], number: int, half: int, mark: str) -> tuple[Sums, float]:
    """What every other step over the windows adds up, and the sum of their losses; those of an earlier run if there are any."""
    path = None if job.folder is None else half_path(job, number, half)
    if path is not None and path.is_file():
        try:
            kept, about = read_names(path, mark)
            parts = Parts(dict.fromkeys(kept, path))
            return Sums.of({name: parts[name].to(job.model.device) for name in kept}), float(about["loss"])
        except (TwofoldError, KeyError, ValueError):
            path.unlink()
    sums, total = Sums(), 0.0
    steps = windows_of_half(job, loss, half)
    windows = sum(len(part) for part in steps)
    leaders = {entry.name: entry.group for entry in job.plan.entries}
    with (
        progress(f"Gradient, half {half + 1} of 2", windows, unit="windows", quiet=job.quiet) as tick,
        _adding(job.model, names, leaders, sums),
    ):
        for part in steps:
            one = loss(part.tolist())
            (one * job.samples.take(part.tolist()).predictions).backward()  # type: ignore[no-untyped-call]
            total += float(one.detach()) * len(part)
            tick(len(part))
    for name, tensor in sums.tensors().items():
        if not torch.isfinite(tensor).all():
            raise TwofoldError(
                f"the {name.partition('/')[0]} moment of {name.partition('/')[2]} in the factored model is NaN or infinite; "
                "keep more of it, or leave that refinement out"
            )
    if path is not None:
        check_space(path.parent, sum(t.numel() * t.element_size() for t in sums.tensors().values()))
        write_part(path, sums.tensors(), mark, {"loss": repr(total)})
    return sums, total


def windows_of_half(job: Job, loss: Likeness, half: int) -> tuple[Tensor, ...]:
    """Every other step over the windows; one window alone is both halves."""
    steps = torch.split(torch.arange(len(job.samples)), loss.together if len(job.samples) > loss.together else 1)
    return steps[half::2] or steps


def half_path(job: Job, number: int, half: int) -> Path:
    assert job.folder is not None
    return job.folder / f"gradient-{number}-{half}.safetensors"


@contextmanager
def _adding(model: nn.Module, names: list[str], leaders: dict[str, str], sums: Sums) -> Iterator[None]:
    """Within the block each backward pass adds what the layers were given and what came back to the sums."""
    taken: dict[str, str] = {}  # leader → the first layer of that input that is called

    def add(into: dict[str, Tensor], key: str, left: Tensor, right: Tensor) -> None:
        if key not in into:
            into[key] = left.new_zeros(left.shape[1], right.shape[1])
        into[key].addmm_(left.T, right)

    def sink(name: str) -> Sink:
        def called(given: Tensor, product: Callable[[], Tensor]) -> Taker | None:
            if not torch.is_grad_enabled():
                return None
            x, leader = _rows(given), leaders[name]
            if taken.setdefault(leader, name) == name:
                add(sums.inputs, leader, x, x)
                sums.rows[leader] = sums.rows.get(leader, torch.zeros((), dtype=torch.int64)) + len(x)

            def came_back(gradient: Tensor) -> None:
                g = _rows(gradient)
                add(sums.gradients, name, g, x)
                add(sums.outputs, name, g, g)

            return came_back

        return Sink(called, starts=True)

    handles = [handle for name in names for handle in watch(model.get_submodule(name), sink(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(values: Tensor) -> Tensor:  # (rows, width)
    flat = values.detach().flatten(0, -2)
    return flat if flat.dtype == torch.float64 else flat.float()
