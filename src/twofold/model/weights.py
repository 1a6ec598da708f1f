"""Which weights of a model are factorized, and which modules share an input; every weight is listed with its reason.

Targets are found from the modules themselves: every ``nn.Linear`` and every GPT-2 style ``Conv1D``. Nothing is looked up by
the name of an architecture. Modules that receive the same tensor form a group, found by running the model once.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from twofold.errors import TwofoldError
from twofold.model.kinds import Sink, kind_of, watch
from twofold.model.kinds.linear import READ_AS_IT_IS
from twofold.model.stacks import stack_of, stacks_of
from twofold.model.target import DenseWeight, Holder, Target, Targets
from twofold.nn.compact import Compact, CompactLinear
from twofold.nn.int_matrix import IntMatrix

SMALLEST = 8  # a weight with fewer rows or columns is left dense

T = TypeVar("T")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Say whether a module's name matches a pattern: a glob on the whole name or on its last parts."""
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"*.{p}") for p in patterns)


def last_match(name: str, by_pattern: Mapping[str, T]) -> T | None:
    """Return the value of the last pattern that a module's name matches; None if there is none."""
    return next((value for pattern, value in reversed(list(by_pattern.items())) if matches(name, [pattern])), None)


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter by its id; one that several modules share has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def find_targets(model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Targets:
    """List every parameter of a model as ``list_weights`` does, and make sure that there is something to factorize.

    Raises:
        TwofoldError: if a pattern matches no linear layer, nothing is left to factorize, or weights are integers already.
    """
    if any(isinstance(module, IntMatrix) for module in model.modules()):
        raise TwofoldError(
            "the model holds weights of integers, which are not factorized again; start from the model that it was made from"
        )
    weights = list_weights(model, include, exclude)
    if not weights.targets:
        factored = any(isinstance(module, CompactLinear) for module in model.modules())
        raise TwofoldError(
            "nothing to factorize: the model has no linear layer that is included and large enough"
            + (" (it is factorized already)" if factored else "")
        )
    return weights


def list_weights(model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Targets:
    """List every parameter of a model: those that are factorized, and those that stay dense with the reason.

    Args:
        model: any module with ``nn.Linear`` or ``Conv1D`` layers; its weights may be on the meta device.
        include: globs; if any are given, only the modules that match one are targets.
        exclude: globs; the modules that match one stay dense.

    Raises:
        TwofoldError: if a pattern matches no linear layer.
    """
    include, exclude = list(include), list(exclude)
    owners, modules = parameter_names(model), dict(model.named_modules())
    kinds = {name: kind for name, module in modules.items() if (kind := kind_of(module)) is not None}
    for pattern in [*include, *exclude]:
        if not any(matches(name, [pattern]) for name in kinds):
            raise TwofoldError(
                f"the pattern {pattern!r} matches no linear layer of this model; list them with: twofold inspect"
            )

    targets: list[Target] = []
    reasons: dict[str, str] = {}
    stacks = stacks_of(model, kinds)
    for name, kind in kinds.items():
        module: Any = modules[name]
        target = replace(kind.target(name, module), stack=stack_of(name, stacks) if stacks else None)
        m, n = target.out_features, target.in_features
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, Compact):
            reason = "a factor: the layer is factorized already"
        elif (against := kind.reason(model, module, parent)) is not None:
            reason = against
        elif len(names := owners[id(module.weight)]) > 1:
            reason = "shared with " + next(other for other in names if other != f"{name}.weight")
        elif include and not matches(name, include):
            reason = "not included"
        elif matches(name, exclude):
            reason = "excluded"
        elif min(m, n) < SMALLEST:
            reason = f"too small: {m} × {n}"
        else:
            targets.append(target)
            continue
        reasons[f"{name}.weight"] = reason

    targeted = {f"{target.name}.weight" for target in targets}
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    dense = [
        DenseWeight(
            name,
            tuple(parameter.shape),
            reasons.get(name) or _reason(name, parameter, id(parameter) in embeddings, modules),
            *_holder(owners[id(parameter)], model),
        )
        for name, parameter in model.named_parameters()
        if name not in targeted
    ]
    return Targets(targets, dense, stacks=stacks)


def _holder(names: list[str], model: nn.Module) -> tuple[Holder, tuple[str, ...]]:
    """Return the kind of the layer that holds a parameter, and the others that share it.

    The kind is "" where no layer of integers can take its place.

    Args:
        names: all names of the parameter; where several layers share it, an embedding has to come first.
    """
    places = [name.rpartition(".") for name in names]
    if any(leaf != "weight" for _, _, leaf in places):
        return "", ()
    first, *rest = (model.get_submodule(owner) for owner, _, _ in places)
    # Shared tables have no bias yet.
    if type(first) is nn.Embedding and all(type(module) is nn.Linear and module.bias is None for module in rest):
        return "embedding", tuple(owner for owner, _, _ in places[1:])
    if not rest and type(first) in (nn.Linear, Conv1D):
        return ("linear" if type(first) is nn.Linear else "transposed"), ()
    return "", ()


def _reason(name: str, parameter: Tensor, embedding: bool, modules: Mapping[str, nn.Module]) -> str:
    """Say why a parameter that no kind of weight takes stays dense."""
    if embedding:
        return "embedding: left dense for now"
    if parameter.dim() < 2:
        return "bias" if name.endswith("bias") else "vector (norm or scale)"
    owner = modules[
        name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    ]
    if isinstance(owner, _ConvNd):
        return "convolution: left dense for now"
    if isinstance(owner, nn.MultiheadAttention):
        return READ_AS_IT_IS
    return f"unsupported layer type: a parameter of {parameter.dim()} dimensions outside of a linear layer"


def find_groups(model: nn.Module, targets: Iterable[Target], run: Callable[[], object]) -> dict[str, str]:
    """Find the modules that receive the same tensor, by running the model once.

    Args:
        run: runs the model on a small batch.

    Returns:
        For each target the name of the first target that received the same tensor in that run (itself if it is alone or
        was not called).
    """
    inputs: dict[str, list[tuple[object, ...]]] = {target.name: [] for target in targets}
    alive: list[Tensor] = []  # keeps each input, so that no address is used twice during the run

    def called(name: str, x: Tensor, product: Callable[[], Tensor]) -> None:
        alive.append(x)
        address = (x.untyped_storage()._cdata, x.storage_offset())
        inputs[name].append((*address, tuple(x.shape), x.stride(), x._version))

    with ExitStack() as hooks, torch.no_grad():
        for name in inputs:
            for handle in watch(model.get_submodule(name), Sink(partial(called, name))):
                hooks.enter_context(handle)
        run()
    # A module that is called several times shares its input only with one that gets the same tensors in the same order.
    leaders: dict[tuple[tuple[object, ...], ...], str] = {}
    return {name: leaders.setdefault(tuple(keys), name) if keys else name for name, keys in inputs.items()}
