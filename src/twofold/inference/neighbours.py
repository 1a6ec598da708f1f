"""Hidden units of an MLP in an order that costs nothing: the weight that makes them and the one that reads them agree on it.

Pairs are proposed by the names of ``structures.roles`` and confirmed by running the model once: with the units in another order
between the two, the reader must still read the same numbers. A norm between them, or heads, would show.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.host.faults import is_ours
from twofold.inference.draft import Draft
from twofold.model.kinds.linear import input_of
from twofold.structures.roles import MLP

Pairs: TypeAlias = list[tuple[list[str], str]]  # the weights that make hidden units, and the one that reads them
ROUNDING = 1e-2  # of the reader's inputs, relative; another order of the units changes them by as much as they are


def find_pairs(model: nn.Module, layers: Mapping[str, tuple[int, int]], run: Callable[[], object]) -> Pairs:
    """Find the weights that make hidden units, and the one that reads them, of each MLP whose units can be put in any order.

    Args:
        layers: the shapes (out, in) of the layers that may be changed, by name.
        run: runs the model on a few tokens.
    """
    proposed: Pairs = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for makers, reader in MLP:
            *names, last = (f"{parent}.{child}".lstrip(".") for child in (*makers, reader))
            if all(name in layers for name in (*names, last)):
                if all(layers[name][0] == layers[last][1] for name in names):
                    proposed.append((names, last))
                break
    return _confirmed(model, proposed, layers, run)


def _confirmed(
    model: nn.Module, proposed: Pairs, layers: Mapping[str, tuple[int, int]], run: Callable[[], object]
) -> Pairs:
    """Return the proposed pairs up to the first that is none: what comes behind it did not get its own inputs."""
    readers = [reader for _, reader in proposed]
    before = _inputs(model, readers, {}, run)
    generator = torch.Generator().manual_seed(0)
    shuffled: dict[str, tuple[Tensor, bool]] = {}
    for makers, reader in proposed:
        order = torch.randperm(layers[reader][1], generator=generator)
        shuffled |= dict.fromkeys(makers, (order, False))
        shuffled[reader] = (order.argsort(), True)
    after = _inputs(model, readers, shuffled, run)
    confirmed = []
    for makers, reader in proposed:
        if len(before.get(reader, [])) != 1 or len(after.get(reader, [])) != 1:
            break
        old, new = before[reader][0].double(), after[reader][0].double()
        if old.shape != new.shape or float((old - new).norm()) > ROUNDING * float(old.norm()):
            break
        confirmed.append((makers, reader))
    return confirmed


def _inputs(
    model: nn.Module, readers: Collection[str], shuffled: Mapping[str, tuple[Tensor, bool]], run: Callable[[], object]
) -> dict[str, list[Tensor]]:
    """Record what the readers get when the model runs; some layers' outputs, or inputs, are put in another order on the way."""
    seen: dict[str, list[Tensor]] = {name: [] for name in readers}
    with ExitStack() as hooks:
        for name, (order, inputs) in shuffled.items():
            module = model.get_submodule(name)
            if inputs:
                hook = module.register_forward_pre_hook(
                    lambda m, args, kwargs, o=order: ((input_of(args, kwargs)[..., o],), {}), with_kwargs=True
                )
            else:
                hook = module.register_forward_hook(lambda m, args, out, o=order: out[..., o])
            hooks.enter_context(hook)
        for name in readers:
            reader = model.get_submodule(name)
            watch = reader.register_forward_pre_hook(
                lambda m, args, kwargs, n=name: seen[n].append(input_of(args, kwargs).detach().clone()),
                with_kwargs=True,
            )
            hooks.enter_context(watch)
        try:
            run()
        except TwofoldError:
            return {}
        except Exception as error:  # an order that something else depends on may end in any error of the model's
            if is_ours(error):
                raise
            return {}
    return seen


def first_on_rows(drafts: Mapping[str, Draft], makers: list[str]) -> str | None:
    """Return the first maker of hidden units that has pivots among its outputs, whose order needs not be kept."""
    return next((name for name in makers if drafts[name].form == "rows"), None)


def fold(drafts: dict[str, Draft], makers: list[str], reader: str) -> str | None:
    """Give the hidden units of an MLP the order in which one of its makers computes them, and return the name of that one.

    None where no maker has pivots among its outputs.
    """
    first = first_on_rows(drafts, makers)
    if first is None or (order := drafts[first].order) is None:
        return None
    take = order.argsort()
    for name in makers:
        drafts[name] = drafts[name].with_outputs(take)
    drafts[reader] = drafts[reader].with_inputs(take)
    return first


def called_in_turn(model: nn.Module, names: Collection[str], run: Callable[[], Any]) -> list[str]:
    """Return the layers in the order in which they are first called when the model runs."""
    calls: dict[str, None] = {}
    with ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: calls.setdefault(n))
            hooks.enter_context(hook)
        run()
    return list(calls)
