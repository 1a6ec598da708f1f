"""The structures of a model: candidates by their names and shapes, confirmed by running it; all other weights stay dense."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import nn

from twofold.errors import TwofoldError
from twofold.model.frozen import evaluating
from twofold.model.settings import Weights
from twofold.model.structure import Structure
from twofold.model.target import Targets
from twofold.objectives import Method
from twofold.objectives.basis_sharing import Sharing
from twofold.quantize.settings import Integers
from twofold.settings.base import Settings
from twofold.structures.check import confirm
from twofold.structures.roles import alone, candidates
from twofold.structures.sharing import share_bases


def find_structures(
    model: nn.Module, targets: Targets, kinds: Collection[str], run: Callable[[], object] | None, settings: Settings
) -> Targets:
    """Find the targets that can be cut together, with their structures; the others are dense, each with the reason.

    Args:
        run: runs the model on a few tokens; None for a model without weights, whose structures can't be confirmed.
        settings: of the run: how a rank is stored, how many blocks share a basis, and the overrides by pattern; weights that are
            treated in different ways share none.

    Raises:
        TwofoldError: if no weight belongs to a structure.
    """
    reasons: dict[str, str] = {}
    structures: list[Structure] = []
    with evaluating(model):
        form = settings.part(Integers).form
        if "dense-columns" in kinds:
            structures += alone(targets.targets, form)
        if "shared-basis" in kinds:
            blocks, overrides = settings.part(Sharing).share_blocks, settings.part(Weights).overrides
            structures += share_bases(targets, form, blocks, overrides)
        for candidate in candidates(model, targets.targets, kinds):
            structure, reason = (candidate, None) if run is None else confirm(model, candidate, run)
            if reason is None:
                structures.append(structure)
            else:
                reasons |= {member.name: f"can't be cut with its partner: {reason}" for member in candidate.members}
    inside = {member.name for structure in structures for member in structure.members}
    for target in targets.targets:
        if target.name not in inside:
            reasons.setdefault(target.name, "no partner that it could be cut together with is factorized")
    if not structures:
        first = next(iter(reasons.values()), "it has no linear layers")
        raise TwofoldError(
            f"no weights of {type(model).__name__} can be cut together ({first}); use an objective that treats each weight "
            f"alone, as {Method().objective}"
        )
    return replace(targets.without(reasons), structures=tuple(structures))
