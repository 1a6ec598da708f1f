"""Layers that a refinement has made, on disk: what took long is not done again by a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pydantic

from twofold.errors import TwofoldError
from twofold.host.parts import Parts, read_names, write_part
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module
from twofold.planning.plan import PlanEntry
from twofold.refine.steps.job import Job


class Solved(pydantic.BaseModel, extra="forbid", ser_json_inf_nan="constants"):
    """Some layers as they were carried out, what the plan has to say of them, and figures that took long."""

    entries: list[PlanEntry]
    notes: list[str]
    figures: dict[str, float] = {}


def keep_layers(path: Path, mark: str, known: Solved, job: Job) -> None:
    """Write layers down, so that a killed run need not solve them again."""
    tensors = {
        f"{entry.name}.{key}": tensor
        for entry in known.entries
        for key, tensor in job.model.get_submodule(entry.name).state_dict().items()
    }
    write_part(path, tensors, mark, {"solved": known.model_dump_json()})


def take_layers(path: Path | None, mark: str, job: Job) -> Solved | None:
    """Put the layers that an earlier run has solved in their places; None if there are none that belong here."""
    if path is None or not path.is_file():
        return None
    try:
        names, about = read_names(path, mark)
    except TwofoldError:
        return None
    parts = Parts(dict.fromkeys(names, path))
    known = Solved.model_validate_json(about["solved"])
    for entry in known.entries:
        old = job.model.get_submodule(entry.name)
        assert entry.rank is not None and entry.form in ("plain", "rows", "columns")
        layer = FactoredLinear(
            entry.in_features, entry.out_features, entry.rank, entry.form, entry.bias, entry.transposed,
            dtype=next(old.parameters()).dtype,
        )  # fmt: skip
        layer.load_state_dict({key: parts[f"{entry.name}.{key}"] for key in layer.state_dict()})
        like = next(old.parameters())
        replace_module(job.model, entry.name, layer.to(like.device, like.dtype))
        layer.requires_grad_(like.requires_grad)
    return known
