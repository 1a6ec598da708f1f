"""How many directions each layer keeps of a change: by a share of its energy, or by one budget for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Changes:
    """The changes of some layers, decomposed."""

    values: dict[str, Tensor] = field(default_factory=dict)  # σ² (k,), largest first
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (m, r), (r, n)
    costs: dict[str, int] = field(default_factory=dict)  # numbers of a rank; also of layers that did not change

    def within(self, rank: int) -> dict[str, int]:
        """Find the ranks that keep the most energy in as many numbers as ``rank`` in every layer would take."""
        values = {name: self.values[name][: left.shape[1]] for name, (left, _) in self.factors.items()}
        ranks = by_budget(values, self.costs, rank * sum(self.costs.values()))
        return {name: r for name, r in ranks.items() if r}

    def energy(self, ranks: Mapping[str, int]) -> float:
        """Return the share of the energy of all layers that these ranks hold."""
        total = sum(float(values.sum()) for values in self.values.values())
        return sum(float(self.values[name][:r].sum()) for name, r in ranks.items()) / total

    def numbers(self, ranks: Mapping[str, int]) -> int:
        """Count the numbers that these ranks take."""
        return sum(r * self.costs[name] for name, r in ranks.items())

    def cut(self, ranks: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the factors of these ranks."""
        return {name: (self.factors[name][0][:, :r], self.factors[name][1][:r]) for name, r in ranks.items()}


def by_energy(
    values: Mapping[str, Tensor],  # σ² (k,) by layer, largest first
    share: float,
) -> dict[str, int]:
    """Find the least rank of each layer whose directions hold this share of its energy; 0 for a layer without change."""
    ranks = {}
    for name, energies in values.items():
        sums = energies.double().cumsum(0)
        total = float(sums[-1]) if len(sums) else 0.0
        ranks[name] = min(len(sums), int((sums < share * total * (1 - 1e-12)).sum()) + 1) if total > 0 else 0
    return ranks


def by_budget(
    values: Mapping[str, Tensor],  # σ² (k,) by layer, largest first
    costs: Mapping[str, int],  # numbers that one direction takes
    budget: int,  # numbers in all
) -> dict[str, int]:
    """Find the ranks that keep the most energy within a budget: the directions with the most for their cost, while it lasts."""
    names = [name for name in values for _ in range(len(values[name]))]
    if not names:
        return {}
    gain = torch.cat([values[name].double() / costs[name] for name in values])
    ranks = dict.fromkeys(values, 0)
    for index in gain.argsort(descending=True, stable=True).tolist():
        name = names[index]
        if float(gain[index]) <= 0:
            break
        if costs[name] <= budget:
            budget -= costs[name]
            ranks[name] += 1
    return ranks
