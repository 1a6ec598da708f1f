"""Whether weights really form a structure, found by changing them and running the model, not by an architecture's name.

- mlp: where the columns of some hidden units are zero, nothing depends on their rows.
- value-output: a change of the basis within each head of the values, undone in the columns that read it, changes nothing.
- query-key: where some dimensions are zero in the queries, nothing depends on them in the keys, and the other way round.

Norms between the weights, heads in another order, or rotations of other pairs fail it. The weights get their bits back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from twofold.model.kinds import dense_weight
from twofold.model.structure import Pairing, Structure
from twofold.structures.units import head_rows, unit_rows

NOISE = {torch.float64: 1e-9, torch.float32: 1e-5}  # rounding of an output, relative; narrower dtypes 0.05
LEAK = 1e-3  # of the effect of a change that may remain where there should be none
PAIRINGS: tuple[Pairing, ...] = ("single", "halves", "neighbours")


def confirm(model: nn.Module, structure: Structure, run: Callable[[], object]) -> tuple[Structure, str | None]:
    """The structure as it really is, and the reason why it can't be cut, if there is one.

    Args:
        run: runs the model on a few tokens.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        original = _output(model, structure.watched, run)
        if original is None:
            return structure, "not called when the model ran on a few tokens, so its partner could not be confirmed"
        if structure.kind == "mlp":
            fits = _mlp(model, structure, run, original, generator)
            return structure, None if fits else "the weight before it does more than make its inputs one by one"
        if structure.kind == "value-output":
            fits = _value_output(model, structure, run, original, generator)
            return structure, None if fits else "values and output are not joined head by head, without a norm between"
        for pairing in PAIRINGS:
            paired = replace_pairing(structure, pairing)
            if paired is not None and _query_key(model, paired, run, original, generator):
                return paired, None
        return structure, "queries and keys are not joined by their dot products alone (a norm, or a partial rotation)"


def replace_pairing(structure: Structure, pairing: Pairing) -> Structure | None:
    """A query-key structure whose units are single dimensions or pairs of them; None if a head has an odd number."""
    if pairing == "single":
        return structure
    if structure.units % 2:
        return None
    members = tuple(replace(member, per_unit=2 * member.per_unit) for member in structure.members)
    return replace(structure, members=members, units=structure.units // 2, pairing=pairing)


def _mlp(
    model: nn.Module, s: Structure, run: Callable[[], object], original: Tensor, generator: torch.Generator
) -> bool:
    *makers, reader = [model.get_submodule(member.name) for member in s.members]
    dropped = torch.randperm(s.units, generator=generator)[: max(s.units // 2, 1)]
    with _kept_safe([*makers, reader]):
        dense_weight(reader)[:, dropped] = 0
        base = _output(model, s.watched, run)
        for maker in makers:
            dense_weight(maker)[dropped] *= -2
            bias = _bias(maker)
            if bias is not None:
                bias[dropped] += 1
        return _same(base, _output(model, s.watched, run), original)


def _value_output(
    model: nn.Module, s: Structure, run: Callable[[], object], original: Tensor, generator: torch.Generator
) -> bool:
    values, output = [model.get_submodule(member.name) for member in s.members]
    v, o, bias = dense_weight(values), dense_weight(output), _bias(values)
    with _kept_safe([values, output]):
        turns = torch.randn(s.key_heads, s.units, s.units, generator=generator, dtype=torch.float64)
        turns = torch.linalg.qr(turns).Q * torch.linspace(0.7, 1.4, s.units, dtype=torch.float64)[:, None]
        for head, turn in enumerate(turns.to(v)):
            rows = head_rows(head, s.units)
            v[rows] = turn @ v[rows]
            if bias is not None:
                bias[rows] = turn @ bias[rows]
        turned = _output(model, s.watched, run)
        for head in range(s.heads):
            back = torch.linalg.inv(turns[head // (s.heads // s.key_heads)]).to(o)
            columns = head_rows(head, s.units)
            o[:, columns] = o[:, columns] @ back
        return _same(original, _output(model, s.watched, run), turned)


def _query_key(
    model: nn.Module, s: Structure, run: Callable[[], object], original: Tensor, generator: torch.Generator
) -> bool:
    keys, queries = [model.get_submodule(member.name) for member in s.members]
    units = torch.stack(
        [torch.randperm(s.units, generator=generator)[: max(s.units // 2, 1)] for _ in range(s.key_heads)]
    )
    key_rows, query_rows = (unit_rows(s, units, heads) for heads in (s.key_heads, s.heads))

    def without(modules: list[tuple[nn.Module, Tensor]]) -> Tensor | None:
        with _kept_safe([keys, queries]):
            for module, rows in modules:
                dense_weight(module)[rows] = 0
                bias = _bias(module)
                if bias is not None:
                    bias[rows] = 0
            return _output(model, s.watched, run)

    base = without([(keys, key_rows), (queries, query_rows)])
    return _same(base, without([(keys, key_rows)]), original) and _same(
        base, without([(queries, query_rows)]), original
    )


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _same(one: Tensor | None, other: Tensor | None, apart: Tensor | None) -> bool:
    """Whether two outputs agree, where a third one shows how much a change can do."""
    if one is None or other is None or apart is None or not torch.isfinite(one).all():
        return False
    noise = NOISE.get(one.dtype, 0.05) * float(one.double().norm())
    effect = float((one.double() - apart.double()).norm())
    return effect > 4 * noise and float((one.double() - other.double()).norm()) <= noise + LEAK * effect


class _Reached(Exception):  # noqa: N818, it is no error
    def __init__(self, output: Tensor) -> None:
        self.output = output


def _output(model: nn.Module, name: str, run: Callable[[], object]) -> Tensor | None:
    """What a module gives when the model runs; nothing behind it is computed. None if it is not called."""

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        raise _Reached(output.detach().clone())

    handle = model.get_submodule(name).register_forward_hook(stop)
    try:
        run()
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    return None


@contextmanager
def _kept_safe(modules: list[nn.Module]) -> Iterator[None]:
    """After the block the weights and biases of these modules have the bits that they had before."""
    saved = [(p, p.detach().clone()) for module in modules for p in module.parameters()]
    try:
        yield
    finally:
        for parameter, before in saved:
            parameter.data.copy_(before)
