"""Whether weights really form a structure, found by changing them and running the model, not by an architecture's name.

- mlp: where the columns of some hidden units are zero, nothing depends on their rows.
- value-output: a change of the basis within each head of the values, undone in the columns that read it, changes nothing.
- query-key: where some dimensions are zero in the queries, nothing depends on them in the keys, and the other way round.

Norms between the weights, heads in another order, or rotations of other pairs fail it. The weights get their bits back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from twofold.model.kinds import dense_weight
from twofold.model.structure import Pairing, Structure
from twofold.structures.units import head_rows, unit_rows

NOISE = {torch.float64: 1e-9, torch.float32: 1e-5}  # rounding of an output, relative; narrower dtypes 0.05
LEAK = 1e-3  # of the effect of a change that may remain where there should be none
PAIRINGS: tuple[Pairing, ...] = ("single", "halves", "neighbours")


@dataclass(frozen=True)
class _Trial:
    """A structure in a model that may be run."""

    model: nn.Module
    structure: Structure
    run: Callable[[], object]
    generator: torch.Generator

    @property
    def modules(self) -> list[nn.Module]:
        return [self.model.get_submodule(member.name) for member in self.structure.members]

    def output(self) -> Tensor | None:
        """Return what the watched module gives when the model runs; nothing behind it is computed. None if it is not called."""

        def stop(module: nn.Module, args: Any, output: Tensor) -> None:
            raise _Reached(output.detach().clone())

        try:
            with self.model.get_submodule(self.structure.watched).register_forward_hook(stop):
                self.run()
        except _Reached as reached:
            return reached.args[0]  # type: ignore[no-any-return]
        return None


def confirm(model: nn.Module, structure: Structure, run: Callable[[], object]) -> tuple[Structure, str | None]:
    """Return the structure as it really is, and the reason why it can't be cut, if there is one.

    Args:
        run: runs the model on a few tokens.
    """
    trial = _Trial(model, structure, run, torch.Generator().manual_seed(0))
    with torch.no_grad():
        original = trial.output()
        if original is None:
            return structure, "not called when the model ran on a few tokens, so its partner could not be confirmed"
        if structure.kind == "mlp":
            fits = _mlp(trial, original)
            return structure, None if fits else "the weight before it does more than make its inputs one by one"
        if structure.kind == "value-output":
            fits = _value_output(trial, original)
            return structure, None if fits else "values and output are not joined head by head, without a norm between"
        for pairing in PAIRINGS:
            paired = replace_pairing(structure, pairing)
            if paired is not None and _query_key(replace(trial, structure=paired), original):
                return paired, None
        return structure, "queries and keys are not joined by their dot products alone (a norm, or a partial rotation)"


def replace_pairing(structure: Structure, pairing: Pairing) -> Structure | None:
    """Return a query-key structure whose units are single dimensions or pairs of them; None if a head has an odd number."""
    if pairing == "single":
        return structure
    if structure.units % 2:
        return None
    members = tuple(replace(member, per_unit=2 * member.per_unit) for member in structure.members)
    return replace(structure, members=members, units=structure.units // 2, pairing=pairing)


def _mlp(trial: _Trial, original: Tensor) -> bool:
    s, (*makers, reader) = trial.structure, trial.modules
    dropped = torch.randperm(s.units, generator=trial.generator)[: max(s.units // 2, 1)]
    with _restored([*makers, reader]):
        dense_weight(reader)[:, dropped] = 0
        base = trial.output()
        for maker in makers:
            weight, *biases = _tensors(maker)
            weight[dropped] *= -2
            for bias in biases:
                bias[dropped] += 1
        return _same(base, trial.output(), original)


def _value_output(trial: _Trial, original: Tensor) -> bool:
    s, (values, output) = trial.structure, trial.modules
    v, o = dense_weight(values), dense_weight(output)
    with _restored([values, output]):
        turns = torch.randn(s.key_heads, s.units, s.units, generator=trial.generator, dtype=torch.float64)
        turns = torch.linalg.qr(turns).Q * torch.linspace(0.7, 1.4, s.units, dtype=torch.float64)[:, None]
        for head, turn in enumerate(turns.to(v)):
            rows = head_rows(head, s.units)
            for tensor in _tensors(values):
                tensor[rows] = turn @ tensor[rows]
        turned = trial.output()
        for head in range(s.heads):
            back = torch.linalg.inv(turns[head // (s.heads // s.key_heads)]).to(o)
            columns = head_rows(head, s.units)
            o[:, columns] = o[:, columns] @ back
        return _same(original, trial.output(), turned)


def _query_key(trial: _Trial, original: Tensor) -> bool:
    s, (keys, queries) = trial.structure, trial.modules
    count = max(s.units // 2, 1)
    units = torch.stack([torch.randperm(s.units, generator=trial.generator)[:count] for _ in range(s.key_heads)])

    def without(*modules: tuple[nn.Module, int]) -> Tensor | None:
        with _restored([keys, queries]):
            for module, heads in modules:
                for tensor in _tensors(module):
                    tensor[unit_rows(s, units, heads)] = 0
            return trial.output()

    of_keys, of_queries = (keys, s.key_heads), (queries, s.heads)
    base = without(of_keys, of_queries)
    return _same(base, without(of_keys), original) and _same(base, without(of_queries), original)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Return the weight of a layer (out, in), and its bias if it has one."""
    bias = getattr(module, "bias", None)
    return [dense_weight(module), *([bias] if isinstance(bias, Tensor) else [])]


def _same(first: Tensor | None, second: Tensor | None, apart: Tensor | None) -> bool:
    """Say whether two outputs agree, where a third one shows how much a change can do."""
    if first is None or second is None or apart is None or not torch.isfinite(first).all():
        return False
    noise = NOISE.get(first.dtype, 0.05) * float(first.double().norm())
    effect = float((first.double() - apart.double()).norm())
    return effect > 4 * noise and float((first.double() - second.double()).norm()) <= noise + LEAK * effect


class _Reached(Exception):  # noqa: N818, it is no error
    """Ends a run that has come to the watched module, with its output."""


@contextmanager
def _restored(modules: list[nn.Module]) -> Iterator[None]:
    """Give the weights and biases of these modules the bits that they had before, after the block."""
    saved = [(p, p.detach().clone()) for module in modules for p in module.parameters()]
    try:
        yield
    finally:
        for parameter, before in saved:
            parameter.data.copy_(before)
