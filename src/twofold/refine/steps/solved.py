"""Layers that a refinement has solved, kept on disk so that a run that goes on need not solve them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pydantic

from twofold.host.parts import take_part, write_part
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module
from twofold.planning.plan import PlanEntry
from twofold.refine.steps.job import Job


class Solved(pydantic.BaseModel, extra="forbid", ser_json_inf_nan="constants"):
    """Some layers as they were carried out, what the plan has to say of them, and figures that took long."""

    entries: list[PlanEntry]
    notes: list[str]
    figures: dict[str, float] = {}


def solved(job: Job, name: str, mark: str, solve: Callable[[], Solved]) -> Solved:
    """Solve some layers, or take those that an earlier run has solved; they get their places in the model and in the plan.

    Args:
        name: of the file that keeps them.
        mark: what the file belongs to.
    """
    path = job.path(f"{name}.safetensors")
    layers = _take_layers(path, mark, job)
    if layers is None:
        layers = solve()
        if path is not None:
            modules = {entry.name: job.model.get_submodule(entry.name) for entry in layers.entries}
            tensors = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
            write_part(path, tensors, mark, {"solved": layers.model_dump_json()})
    entries = {entry.name: entry for entry in layers.entries}
    job.plan.entries[:] = [entries.get(entry.name, entry) for entry in job.plan.entries]
    job.plan.notes.extend(layers.notes)
    return layers


def _take_layers(path: Path | None, mark: str, job: Job) -> Solved | None:
    """Put the layers that an earlier run has solved in their places; None if there are none that belong here."""
    part = take_part(path, mark)
    if part is None:
        return None
    tensors, about = part
    layers = Solved.model_validate_json(about["solved"])
    for entry in layers.entries:
        like = next(job.model.get_submodule(entry.name).parameters())
        assert entry.rank is not None and entry.form in ("plain", "rows", "columns")
        layer = FactoredLinear(
            entry.in_features, entry.out_features, entry.rank, entry.form, bias=entry.bias, transposed=entry.transposed,
            dtype=like.dtype,
        )  # fmt: skip
        layer.load_state_dict({key: tensors[f"{entry.name}.{key}"] for key in layer.state_dict()})
        replace_module(job.model, entry.name, layer.to(like.device, like.dtype))
        layer.requires_grad_(like.requires_grad)
    return layers
