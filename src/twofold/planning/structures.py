"""The sizes that a structure may have, as a candidate of an allocation: one choice for all its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twofold.allocate import Candidate, Choice
from twofold.errors import TwofoldError
from twofold.linalg.gauge import gauge_storage, plain_storage
from twofold.model.settings import Override
from twofold.model.structure import Member, Structure
from twofold.model.target import Target, Targets
from twofold.model.weights import matches
from twofold.nn.layers._basis import SharedBasis
from twofold.planning.menu import Asked, Menu, aligned, at_most
from twofold.planning.plan import PlanEntry
from twofold.structures.units import even_shares


@dataclass(frozen=True)
class MemberSize:
    """What one weight keeps at one size of its structure."""

    target: Target
    member: Member
    kept: int | None  # rows, columns or ranks; None: dense
    common: int = 0  # its share of the numbers that the members store in common

    @property
    def numbers(self) -> int:
        return self.target.size if self.kept is None else cost(self.target, self.member, self.kept) + self.common


def cost(target: Target, member: Member, kept: int) -> int:
    """Count the numbers that so many rows, columns or ranks of a weight store by themselves."""
    if member.form == "gauge":
        return gauge_storage(target.out_features, target.in_features, kept)
    if member.form == "plain":
        return plain_storage(target.out_features, target.in_features, kept)
    if member.form in SharedBasis.FORMS:
        return kept * target.out_features
    return kept * (target.in_features if member.form == "kept-rows" else target.out_features)


def integers(target: Target, member: Member, kept: int) -> int:
    """Count the integers that are stored beside them, at the most."""
    if member.form == "gauge":
        return target.in_features + max(target.out_features, target.in_features)
    if member.form in SharedBasis.FORMS:
        return 0
    return target.in_features if member.form == "plain" else kept


def sizes_at(targets: Targets, structure: Structure, units: int | None) -> list[MemberSize]:
    """Return what each weight of a structure keeps at a number of units; None: dense."""
    by_name = {target.name: target for target in targets.targets}
    shares = even_shares(0 if units is None else structure.common_numbers(units), len(structure.members))
    return [
        MemberSize(by_name[member.name], member, None if units is None else units * member.per_unit, share)
        for member, share in zip(structure.members, shares, strict=True)
    ]


def structure_menu(asked: Asked) -> Menu:
    """Return what may be chosen for weights that are cut together: one candidate for each structure, by its name."""
    targets, structures = asked.targets, asked.targets.structures
    tails = {one.name: asked.tails(one.name, one.units * one.members[-1].per_unit) for one in structures}
    candidates = [structure_candidate(asked, one, tails[one.name]) for one in structures]
    by_name = {candidate.name: candidate for candidate in candidates}
    wanted = {one.name: forced_size(one, by_name[one.name], asked.recipe.overrides) for one in structures}
    forced = {name: choice for name, choice in wanted.items() if choice is not None}

    def entries(choices: Mapping[str, Choice]) -> list[PlanEntry]:
        """Return the entries in the order of the targets; the last of a structure has its loss."""
        by_target: dict[str, PlanEntry] = {}
        for structure in structures:
            index, loss = choices[structure.name].index, tails[structure.name]
            units = None if index is None else int(by_name[structure.name].ranks[index])
            for size in sizes_at(targets, structure, units):
                last = size.member.name == structure.name
                lost = float(max(loss[size.kept], 0.0)) if last and size.kept is not None else 0.0
                reason = asked.reason(size.kept, forced=structure.name in forced)
                reason += structure.words(last, size.kept is None)
                losses = (lost, float(loss[0]) if last else 0.0)
                by_target[size.target.name] = asked.entry(
                    size.target, size.kept, size.member.form, size.numbers, losses, reason, structure.basis
                )
        return [by_target[target.name] for target in targets.targets]

    return Menu(candidates, forced, entries)


def structure_candidate(
    asked: Asked,
    structure: Structure,
    tails: NDArray[np.float64],  # (rows or columns of the last member + 1,), what keeping so many loses
) -> Candidate:
    """Return a structure as a candidate: its ranks are units."""
    recipe, targets, element = asked.recipe, asked.targets, asked.scale
    units = np.arange(min(max(recipe.min_rank, 1), structure.units - 1), structure.units)
    units = aligned(units[units > 0], recipe.aligned)
    if structure.kind == "shared-basis" and tails[0] > 0:
        units = units[: int((tails[units] > 0).sum()) + 1]  # more rank than the numerical one buys nothing
    costs = []
    for count in units:
        members = sizes_at(targets, structure, int(count))
        extra = sum(4 * integers(one.target, one.member, one.kept or 0) + element for one in members)
        extra = extra + 4 * structure.common_integers if recipe.in_bytes else 0
        costs.append(element * sum(one.numbers for one in members) + extra)
    full = float(element * sum(one.numbers for one in sizes_at(targets, structure, None)))
    losses = tails[units * structure.members[-1].per_unit] * asked.weight(tails, structure.layers)
    return Candidate(structure.name, units, np.array(costs, dtype=np.float64), losses, full, full, kind=structure.kind)


def forced_size(structure: Structure, candidate: Candidate, overrides: Mapping[str, Override]) -> Choice | None:
    """Choose what an override of any of its weights asks for; the last one that matches wins.

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
        if last.rank >= structure.units:
            return Choice(None)
        return at_most(candidate.ranks, last.rank)
    assert last.keep is not None
    allowed = last.keep * candidate.full_cost * (1 + 1e-9)
    if allowed >= candidate.full_cost:
        return Choice(None)
    return at_most(candidate.costs, allowed)
