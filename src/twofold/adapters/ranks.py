"""How many directions each layer keeps of a change: by a share of its energy, or by one budget for all layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def by_energy(
    values: Mapping[str, Tensor],  # σ² (k,) by layer, largest first
    share: float,
) -> dict[str, int]:
    """The least rank of each layer whose directions hold this share of its energy; 0 for a layer without change."""
    ranks = {}
    for name, found in values.items():
        sums = found.double().cumsum(0)
        total = float(sums[-1]) if len(sums) else 0.0
        ranks[name] = min(len(sums), int((sums < share * total * (1 - 1e-12)).sum()) + 1) if total > 0 else 0
    return ranks


def by_budget(
    values: Mapping[str, Tensor],  # σ² (k,) by layer, largest first
    costs: Mapping[str, int],  # numbers that one direction takes
    budget: int,  # numbers in all
) -> dict[str, int]:
    """The ranks that keep the most energy within a budget: the directions with the most for their cost, as far as it goes."""
    names = [name for name in values for _ in range(len(values[name]))]
    if not names:
        return {}
    gain = torch.cat([values[name].double() / costs[name] for name in values])
    ranks = dict.fromkeys(values, 0)
    full: set[str] = set()
    for index in gain.argsort(descending=True, stable=True).tolist():
        name = names[index]
        if float(gain[index]) <= 0:
            break
        if name in full:
            continue
        if costs[name] > budget:  # the next of this layer costs as much
            full.add(name)
            continue
        budget -= costs[name]
        ranks[name] += 1
    return ranks
