"""The sizes that a structure may have, as a candidate of an allocation: one choice for all its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import Candidate, Choice
from twofold.errors import TwofoldError
from twofold.linalg.gauge import order_integers, rank_numbers
from twofold.model.settings import Override
from twofold.model.structure import Member, Structure
from twofold.model.target import Target
from twofold.model.weights import matches
from twofold.nn.layers._basis import SharedBasis
from twofold.planning.menu import Menu, PlanRequest, at_most
from twofold.planning.plan import PlanEntry
from twofold.planning.storage import ORDER_BYTES
from twofold.structures.units import even_shares


@dataclass(frozen=True)
class MemberSize:
    """What one weight keeps at one size of its structure."""

    target: Target
    member: Member
    kept: int | None  # rows, columns or ranks; None: dense
    common: int  # its share of the numbers that the members store in common

    @property
    def numbers(self) -> int:
        """The numbers that it stores."""
        target, form = self.target, self.member.form
        if self.kept is None:
            return target.size
        if form in ("gauge", "plain"):
            return rank_numbers(form, target, self.kept) + self.common
        return self.kept * (target.in_features if form == "kept-rows" else target.out_features) + self.common

    @property
    def integers(self) -> int:
        """The integers that it stores beside them, at the most."""
        if self.member.form in ("gauge", "plain"):
            return self.target.in_features + order_integers(self.member.form, self.target)
        return 0 if self.member.form in SharedBasis.FORMS else self.kept or 0


def member_sizes(request: PlanRequest, structure: Structure, units: int | None) -> list[MemberSize]:
    """Return what each weight of a structure keeps at a number of units; None: dense."""
    shares = even_shares(0 if units is None else structure.common_numbers(units), len(structure.members))
    return [
        MemberSize(request.by_name[member.name], member, None if units is None else units * member.per_unit, share)
        for member, share in zip(structure.members, shares, strict=True)
    ]


def structure_menu(request: PlanRequest) -> Menu:
    """Return what may be chosen for weights that are cut together: one candidate for each structure, by its name."""
    structures = {structure.name: structure for structure in request.targets.structures}
    tails = {
        name: request.tails(name, structure.units * structure.members[-1].per_unit)
        for name, structure in structures.items()
    }
    candidates = [structure_candidate(request, structures[name], losses) for name, losses in tails.items()]
    overrides = request.recipe.overrides
    forced = {
        candidate.name: choice
        for candidate in candidates
        if (choice := forced_size(structures[candidate.name], candidate, overrides)) is not None
    }

    def entries(candidate: Candidate, choice: Choice) -> list[PlanEntry]:
        """Return the entries of all members; the last one has the loss."""
        structure, loss, units = structures[candidate.name], tails[candidate.name], choice.rank(candidate)
        entries = []
        for size in member_sizes(request, structure, units):
            last, kept = size.member.name == structure.name, size.kept
            lost = float(max(loss[kept], 0.0)) if last and kept is not None else 0.0
            reason = request.reason(kept, forced=structure.name in forced) + structure.words(last, kept is None)
            losses, basis = (lost, float(loss[0]) if last else 0.0), None if kept is None else structure.basis
            form = size.member.form
            entries.append(request.entry(size.target, kept, form, size.numbers, losses, reason, basis=basis))
        return entries

    return Menu(candidates, forced, entries)


def structure_candidate(
    request: PlanRequest,
    structure: Structure,
    tails: NDArray[np.float64],  # (rows or columns of the last member + 1,), what keeping so many loses
) -> Candidate:
    """Return a structure as a candidate: its ranks are units."""
    units = request.ranks(structure.units - 1)
    if structure.kind == "shared-basis" and tails[0] > 0:
        units = units[: int((tails[units] > 0).sum()) + 1]  # more rank than the numerical one buys nothing
    in_bytes, costs = request.recipe.in_bytes, []
    for count in units:
        sizes = member_sizes(request, structure, int(count))
        order = structure.common_integers + sum(size.integers for size in sizes)
        beside = ORDER_BYTES * order + request.element * len(sizes) if in_bytes else 0
        costs.append(request.scale * sum(size.numbers for size in sizes) + beside)
    whole = float(request.scale * sum(size.numbers for size in member_sizes(request, structure, None)))
    losses = tails[units * structure.members[-1].per_unit] * request.weight(tails, structure.layers)
    return Candidate(
        structure.name, units, np.array(costs, dtype=np.float64), losses, whole, whole, kind=structure.kind
    )


def forced_size(structure: Structure, candidate: Candidate, overrides: Mapping[str, Override]) -> Choice | None:
    """Choose what an override of any of its weights asks for; the last one that matches wins; None if there is none.

    Raises:
        TwofoldError: if it asks for a rank, which says nothing of several weights.
    """
    last = None
    for pattern, override in overrides.items():
        if any(matches(member.name, [pattern]) for member in structure.members):
            if override.rank is not None and len(structure.members) > 1 and structure.basis is None:
                raise TwofoldError(
                    f"the override {pattern!r} asks for a rank, and {structure.name} is cut together with others; "
                    "use keep:SHARE or dense"
                )
            last = override
    if last is None:
        return None
    if last.dense or not len(candidate.ranks):
        return Choice(None)
    if last.rank is not None:
        return Choice(None) if last.rank >= structure.units else at_most(candidate.ranks, last.rank)
    assert last.keep is not None
    allowed = last.keep * candidate.full_cost * (1 + 1e-9)
    return Choice(None) if allowed >= candidate.full_cost else at_most(candidate.costs, allowed)
