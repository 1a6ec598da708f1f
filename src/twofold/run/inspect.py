"""What a model is made of: every weight, what can be done with it, and which weights share an input."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import pydantic
import torch

from twofold.errors import TwofoldError
from twofold.host.faults import models_errors
from twofold.model.load import LoadedModel, load_skeleton
from twofold.model.stacks import stack_words
from twofold.model.survey import survey
from twofold.model.target import Targets
from twofold.model.weights import find_groups, list_weights
from twofold.nn.compact import Compact, CompactLinear
from twofold.task import find_task


class Weight(pydantic.BaseModel, extra="forbid"):
    """One parameter, one factored layer, or one basis that factored layers share."""

    name: str
    kind: str  # the last part of its name, behind its stack if the model has several
    shape: list[int]
    numbers: int
    what: str  # "can be factorized", "factored, rank r", or why not
    group: str | None = None  # the first weight that gets the same input


class Inspection(pydantic.BaseModel, extra="forbid"):
    """A model as Twofold sees it."""

    model: str
    architecture: str
    weights: list[Weight]
    shared: list[str]  # kinds that share an input, in words
    factored: int
    target_numbers: int
    total_numbers: int


def inspect(
    model: str,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    trust_remote_code: bool = False,
    dequantize: bool = False,
) -> Inspection:
    """List the weights of a model from its configuration; none is loaded.

    Raises:
        TwofoldError: if it can't be read, or a pattern matches nothing.
    """
    loaded = load_skeleton(model, trust_remote_code=trust_remote_code, dequantize=dequantize)
    layers = {n: m for n, m in loaded.model.named_modules() if isinstance(m, Compact) and m.CHILDREN}
    weights: list[Weight] = []
    targets = list_weights(loaded.model, include, exclude)
    groups = _groups(loaded, targets)
    members: dict[str, list[str]] = {}
    stacks = stack_words(targets.stacks)

    def in_stack(name: str, kind: str) -> str:
        return f"{stacks.get(targets.stack_of(name) or '', '')} {kind}".strip()

    for target in targets.targets:
        name, kind, group = f"{target.name}.weight", in_stack(target.name, target.kind), groups.get(target.name)
        members.setdefault(group or target.name, []).append(kind)
        shape, what = [target.out_features, target.in_features], "can be factorized"
        weights.append(Weight(name=name, kind=kind, shape=shape, numbers=target.size, what=what, group=group))
    numbers = targets.target_numbers
    for name, layer in layers.items():
        what = f"{layer.words}, keeps {layer.keep:.1%}" if isinstance(layer, CompactLinear) else layer.words
        kind = in_stack(name, name.rpartition(".")[2]) if layer.KIND else "basis"
        weights.append(Weight(name=name, kind=kind, shape=layer.shape, numbers=layer.numbers, what=what))
        numbers += layer.numbers if hasattr(layer, "in_features") else 0
    factors = tuple(f"{name}.{child}." for name, layer in layers.items() for child in layer.CHILDREN)
    for entry in targets.dense:
        if not entry.name.startswith(factors):
            kind = in_stack(entry.name, entry.name.rpartition(".")[0].rpartition(".")[2] or entry.name)
            shape = list(entry.shape)
            weights.append(Weight(name=entry.name, kind=kind, shape=shape, numbers=entry.size, what=entry.reason))
    # All blocks of a decoder have the keys and values of one encoder's output.
    together = [list(dict.fromkeys(kinds)) if stacks else kinds for kinds in members.values()]
    return Inspection(
        model=model,
        architecture=type(loaded.model).__name__,
        weights=weights,
        shared=list(dict.fromkeys(", ".join(kinds) for kinds in together if len(kinds) > 1)),
        factored=sum(isinstance(layer, CompactLinear) for layer in layers.values()),
        target_numbers=numbers,
        total_numbers=sum(weight.numbers for weight in weights),
    )


def _groups(loaded: LoadedModel, targets: Targets) -> dict[str, str]:
    """Find which targets share an input; nothing if the model runs neither as its task says, nor on its own example input."""
    model, task = loaded.model, find_task(loaded.model)
    if task is not None:
        with suppress(TwofoldError):
            return survey(loaded, targets.targets, task.example(model)).groups
    example = getattr(model, "dummy_inputs", None)
    if not isinstance(example, dict):
        return {}
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in example.items() if isinstance(value, torch.Tensor)}
    with suppress(TwofoldError), models_errors(str):  # an architecture that needs still other inputs
        return find_groups(model, targets.targets, lambda: model(**inputs))
    return {}
