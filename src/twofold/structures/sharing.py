"""Which weights share a basis for their inputs: those of one place in consecutive blocks; what finds no partner is alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from twofold.model.settings import Override
from twofold.model.structure import Member, Structure
from twofold.model.target import BLOCK, Target, Targets, block_of
from twofold.model.weights import last_match
from twofold.nn.layers._basis import SharedForm, basis_storage
from twofold.structures.roles import ATTENTION, MLP

# What gives the output of a part of a block.
UNSHARED = {names[-1] for names in ATTENTION} | {reader for _, reader in MLP}
Place = tuple[str, int]  # a weight's name without the number of its block, and which blocks in a row it stands in
DENSE_PARTNERS = "the others of its kind in its blocks stay dense"


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
    def form(self) -> SharedForm:
        """How the basis is stored."""
        return "shared-columns" if self.stored == "gauge" else "shared-plain"

    @property
    def layers(self) -> int:
        return len(self.targets)

    def words(self, last: bool, dense: bool) -> str:
        if self.basis is None:
            return "" if dense else f", on a basis of its own: {self.why}"
        return f", with the others of its {self.layers} blocks" if dense else f", on a basis for {self.layers} blocks"

    def common_numbers(self, units: int) -> int:
        return 0 if self.basis is None else basis_storage(self.form, self.targets[0].in_features, units)

    @property
    def common_integers(self) -> int:
        return self.targets[0].in_features if self.basis is not None and self.stored == "gauge" else 0

    def less(self, gone: Collection[str]) -> Structure | None:
        left = [target for target in self.targets if target.name not in gone]
        return sharing(left, self.stored, DENSE_PARTNERS) if left else None


def sharing(targets: Sequence[Target], stored: Literal["gauge", "plain"], why: str = "") -> Sharing:
    """Some weights of one shape with a basis; its sizes are the ranks that store less than the dense weights.

    Args:
        why: if there is one, the reason why it is alone.
    """
    rows, n = sum(target.out_features for target in targets), targets[0].in_features
    largest = (rows * n - 1) // (rows + n) if stored == "plain" else min(rows, n) - 1
    made = Sharing("shared-basis", (), largest + 1, targets=tuple(targets), stored=stored, why=why)
    form = stored if made.basis is None else made.form
    members = tuple(Member(target.name, form, 1) for target in targets)
    return replace(made, members=members)


def share_bases(
    targets: Targets,
    stored: Literal["gauge", "plain"],
    blocks: int,
    overrides: Mapping[str, Override],
) -> list[Structure]:
    """All targets by the bases that they share, in the order of the first weight of each.

    One basis is for weights that have the same place in consecutive blocks, one shape, and the same override or none. What
    gives the output of an attention or of an MLP is left alone, as in the paper.

    Args:
        blocks: so many in a row share a basis.
    """
    places = {target.name: _place(target.name, target.layer, blocks) for target in targets.targets}
    groups: dict[tuple[object, ...], list[Target]] = {}
    for target in targets.targets:
        place = places[target.name]
        override = repr(last_match(target.name, overrides))
        alike: tuple[object, ...] = (target.name,)
        if place is not None:
            alike = (place, target.out_features, target.in_features, override)
        groups.setdefault(alike, []).append(target)
    known = Counter(place for target in targets.targets if (place := places[target.name]) is not None)
    kept_dense = {_place(name := entry.name.removesuffix(".weight"), block_of(name), blocks) for entry in targets.dense}
    found: list[Structure] = []
    for alike, group in groups.items():
        why = ""
        if len(group) == 1:
            target, place = group[0], places[group[0].name]
            if place is None:
                why = _unshared(target, blocks)
            elif known[place] > 1:
                same = sum(other[:3] == alike[:3] for other in groups)
                why = "an override holds for it or for the others" if same > 1 else "the others have another shape"
            else:
                why = DENSE_PARTNERS if place in kept_dense else "no block is left to share it with"
        found.append(sharing(group, stored, why))
    return found


def alone_notes(structures: Sequence[Structure]) -> list[str]:
    """Which weights have a basis of their own and why, in words for the plan."""
    reasons = Counter(one.why for one in structures if isinstance(one, Sharing) and one.basis is None)
    return [
        f"{'1 weight has a basis of its' if count == 1 else f'{count} weights have a basis of their'} own: {why}"
        for why, count in reasons.items()
    ]


def _place(name: str, block: int | None, blocks: int) -> Place | None:
    """Where a weight stands; None for one that is not shared wherever it stands."""
    if block is None or blocks == 1 or _gives_output(name):
        return None
    return BLOCK.sub(".#.", name, count=1), block // blocks


def _gives_output(name: str) -> bool:
    parent, _, kind = name.rpartition(".")
    return kind in UNSHARED and not parent.endswith("intermediate")  # BERT calls both halves of its MLP "dense"


def _unshared(target: Target, blocks: int) -> str:
    if blocks == 1:
        return "each block was to have its own"
    if target.layer is None:
        return "it stands in no block"
    return "what gives the output of an attention or an MLP is not shared"
