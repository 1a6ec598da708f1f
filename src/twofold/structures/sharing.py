"""Which weights share a basis for their inputs: those of one place in consecutive blocks; what finds no partner is alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from twofold.model.settings import Override
from twofold.model.structure import Member, Structure
from twofold.model.target import BLOCK, Target, Targets, block_of
from twofold.model.weights import last_match
from twofold.nn.layers._basis import SharedForm, basis_storage
from twofold.structures.roles import ATTENTION, MLP, rank_sizes

# What gives the output of a part of a block.
UNSHARED = {names[-1] for names in ATTENTION} | {reader for _, reader in MLP}
Place = tuple[str, int]  # a weight's name without the number of its block, and which blocks in a row it stands in
DENSE_PARTNERS = "the others of its kind in its blocks stay dense"
FORMS: dict[str, SharedForm] = {"gauge": "shared-columns", "plain": "shared-plain"}  # of a basis


@dataclass(frozen=True)
class Sharing(Structure):
    """Weights of several blocks with one basis, or one weight alone; a unit is a rank."""

    targets: tuple[Target, ...] = ()
    stored: Literal["gauge", "plain"] = "gauge"
    why: str = ""  # the reason, of one that is alone

    @property
    def basis(self) -> str | None:
        return None if len(self.targets) == 1 else self.targets[0].name.replace(".", "-")

    @property
    def layers(self) -> int:
        return len(self.targets)

    def words(self, last: bool, dense: bool) -> str:
        if self.basis is None:
            return "" if dense else f", on a basis of its own: {self.why}"
        return f", with the others of its {self.layers} blocks" if dense else f", on a basis for {self.layers} blocks"

    def common_numbers(self, units: int) -> int:
        return 0 if self.basis is None else basis_storage(FORMS[self.stored], self.targets[0].in_features, units)

    @property
    def common_integers(self) -> int:
        return self.targets[0].in_features if self.basis is not None and self.stored == "gauge" else 0

    def less(self, gone: Collection[str]) -> Structure | None:
        left = [target for target in self.targets if target.name not in gone]
        return sharing(left, self.stored, DENSE_PARTNERS) if left else None


def sharing(targets: Sequence[Target], stored: Literal["gauge", "plain"], why: str = "") -> Sharing:
    """Return the structure of some weights of one shape with a basis.

    Args:
        why: if there is one, the reason why it is alone.
    """
    units = rank_sizes(sum(target.out_features for target in targets), targets[0].in_features, stored)
    members = tuple(Member(target.name, stored if len(targets) == 1 else FORMS[stored], 1) for target in targets)
    return Sharing("shared-basis", members, units, targets=tuple(targets), stored=stored, why=why)


def share_bases(
    targets: Targets, stored: Literal["gauge", "plain"], blocks: int, overrides: Mapping[str, Override]
) -> list[Structure]:
    """Group all targets by the bases that they share, in the order of the first weight of each.

    One basis is for weights that have the same place in consecutive blocks, one shape, and the same override or none. What
    gives the output of an attention or of an MLP is left alone, as in the paper.

    Args:
        blocks: so many in a row share a basis.
    """
    places = {target.name: _place(target.name, target.stack, blocks) for target in targets.targets}
    groups: dict[tuple[object, ...], list[Target]] = {}
    for target in targets.targets:
        alike: tuple[object, ...] = (target.name,)
        if (place := places[target.name]) is not None:
            override = repr(last_match(target.name, overrides))
            alike = (place, target.out_features, target.in_features, override)
        groups.setdefault(alike, []).append(target)
    counts = Counter(places.values())
    names = [entry.name.removesuffix(".weight") for entry in targets.dense]
    dense = {_place(name, targets.stack_of(name), blocks) for name in names}

    def why_alone(target: Target, alike: tuple[object, ...]) -> str:
        place = places[target.name]
        if place is None:
            return _unshared(target.name, target.layer, blocks)
        if counts[place] > 1:
            of_its_shape = sum(other[:3] == alike[:3] for other in groups)
            return "an override holds for it or for the others" if of_its_shape > 1 else "the others have another shape"
        return DENSE_PARTNERS if place in dense else "no block is left to share it with"

    return [
        sharing(group, stored, why_alone(group[0], alike) if len(group) == 1 else "") for alike, group in groups.items()
    ]


def alone_notes(structures: Sequence[Structure]) -> list[str]:
    """Say which weights have a basis of their own and why, for the plan."""
    reasons = Counter(s.why for s in structures if isinstance(s, Sharing) and s.basis is None)
    return [
        f"{'1 weight has a basis of its' if count == 1 else f'{count} weights have a basis of their'} own: {why}"
        for why, count in reasons.items()
    ]


def _place(name: str, stack: str | None, blocks: int) -> Place | None:
    """Say where a weight stands; None for one that is not shared wherever it stands."""
    block = block_of(name, stack)
    if block is None or _unshared(name, block, blocks):
        return None
    before = stack or ""
    return before + BLOCK.sub(".#.", name[len(before) :], count=1), block // blocks


def _unshared(name: str, block: int | None, blocks: int) -> str:
    """Say why a weight is not shared wherever it stands; nothing if it may be."""
    if blocks == 1:
        return "each block was to have its own"
    if block is None:
        return "it stands in no block"
    parent, _, kind = name.rpartition(".")
    if kind in UNSHARED and not parent.endswith("intermediate"):  # BERT calls both halves of its MLP "dense"
        return "what gives the output of an attention or an MLP is not shared"
    return ""
