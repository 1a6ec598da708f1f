"""Which moments are collected: the cheapest ones that serve the objectives."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from twofold.calibrate.statistics import BACKWARD, size_of
from twofold.model.target import Target
from twofold.objectives import Statistic


@dataclass(frozen=True)
class Request:
    """What to collect, and from where: statistic → target name → size of the moment."""

    sizes: dict[str, dict[str, int]]  # "input" → {leader: n}, …

    @property
    def backward(self) -> bool:
        """Whether gradients are needed."""
        return any(self.sizes.get(kind) for kind in BACKWARD)

    @property
    def numbers(self) -> int:
        """How many numbers the moments hold."""
        return sum(self.numbers_of(kind) for kind in self.sizes)

    def names(self) -> list[str]:
        """Return the names of the moments, as they are kept."""
        return [f"{kind}/{name}" for kind, owners in self.sizes.items() for name in owners]

    def numbers_of(self, kind: str, targets: Iterable[str] | None = None) -> int:
        """Count the numbers that the moments of one kind hold, of all targets or of some."""
        owners = self.sizes[kind]
        names = owners if targets is None else owners.keys() & set(targets)
        return sum(math.prod(size_of(kind, owners[name])) for name in names)


def request_statistics(
    targets: Iterable[Target], groups: dict[str, str], needs: Iterable[Statistic], *, both_sides: bool = False
) -> Request:
    """Choose the cheapest moments that serve the objectives.

    Where inputs are to be centred, or may be ("bias_mean"), the mean of what is collected of them stands beside it.

    Args:
        groups: target → the first target with the same input.
        needs: what the objectives ask for.
        both_sides: collect C and G themselves for every target, whatever their size (to check the others against).
    """
    targets, needs = list(targets), set(needs)
    means = "bias_mean" in needs or any(target.centred for target in targets)
    sizes: dict[str, dict[str, int]] = {}

    def ask(kind: str, name: str, size: int) -> None:
        sizes.setdefault(kind, {})[name] = size

    members: dict[str, list[Target]] = {}
    for target in targets:
        members.setdefault(groups.get(target.name, target.name), []).append(target)
    for leader, group in members.items():
        n = group[0].in_features
        if "input" in needs:
            products = sum(t.out_features**2 for t in group)
            if both_sides or any(t.out_features > n for t in group) or n * n <= products:
                ask("input", leader, n)
            else:
                for target in group:
                    ask("output", target.name, target.out_features)
                    if means and target.bias:
                        ask("output_mean", target.name, target.out_features)
            ask("input_trace", leader, 1)
        if "whole_input" in needs:
            ask("input", leader, n)
        if means and any(target.bias for target in group):
            ask("input_mean", leader, n)
        for kind in ("input_mean", "input_abs", "input_square"):
            if kind in needs:
                ask(kind, leader, n)
        for target in group:
            ask("rows", target.name, 1)
            if "gradient" in needs:
                if target.out_features <= n or both_sides:
                    ask("gradient", target.name, target.out_features)
                else:
                    ask("input_gradient", target.name, n)
                ask("gradient_trace", target.name, 1)
            if "gradient_square" in needs:
                ask("gradient_square", target.name, target.out_features)
                ask("gradient_trace", target.name, 1)
            if "fisher_rows" in needs:
                ask("fisher_rows", target.name, target.out_features)
    return Request(sizes)
