"""Hooks on the targets that add to the sums of moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from twofold.calibrate.request import Request
from twofold.calibrate.statistics import STATISTICS, Add, Feed, rows_of, size_of
from twofold.model.kinds import Sink, Taker, watch
from twofold.model.streamed import Resident
from twofold.model.target import Target


class Accumulator:
    """The sums of some targets, while the model is run.

    Args:
        kinds: of moments that this run gives.
        weights: the dense weights (out, in) that the moments are of, by the names of targets in whose places other layers stand.
        starts: whether what no gradient would reach starts a graph.
    """

    def __init__(
        self,
        residence: Resident,
        targets: list[Target],
        request: Request,
        kinds: tuple[str, ...],
        weights: Mapping[str, Tensor],
        *,
        starts: bool = False,
    ) -> None:
        self.weights = weights
        self.dtype = torch.float64 if residence.dtype == torch.float64 else torch.float32
        here = {target.name for target in targets}
        self.sums = {
            f"{kind}/{name}": torch.zeros(size_of(kind, k), dtype=self.dtype, device=residence.device)
            for kind, owners in request.sizes.items()
            for name, k in owners.items()
            if kind in kinds and name in here
        }
        self.handles: list[Any] = []
        for name in (target.name for target in targets):
            self.handles += watch(residence.model.get_submodule(name), self._sink(name, starts))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _sink(self, name: str, starts: bool) -> Sink:
        """Return what takes what passes a weight, and takes nothing that no sum is fed."""
        inputs, outputs, gradients = (self._fed(name, feed) for feed in ("inputs", "outputs", "gradients"))
        back, pairs = self._fed(name, "input_gradients"), self._fed(name, "pairs")
        # Where another layer stands, what the weight would give follows from what the layer is given.
        weight = self.weights[name].to(self.dtype) if name in self.weights else None

        def calls(x: Tensor, product: Callable[[], Tensor]) -> Taker | None:
            rows = self._flat(x) if inputs or pairs or weight is not None else x
            _add(inputs, rows)
            if outputs:
                _add(outputs, self._flat(product()) if weight is None else rows @ weight.T)
            squares = rows.square().sum(1) if pairs else None

            def take(gradient: Tensor) -> None:
                g = self._flat(gradient)
                _add(gradients, g)
                if weight is not None and back:
                    _add(back, g @ weight)
                if squares is not None:
                    _add(pairs, squares @ g.square())

            return take if gradients or pairs or (weight is not None and back) else None

        def handed_back(gradient: Tensor) -> None:
            _add(back, self._flat(gradient))

        return Sink(calls, handed_back if back and weight is None else None, starts)

    def _fed(self, name: str, feed: Feed) -> list[tuple[Add, Tensor]]:
        """Return the sums of a weight that are fed so, and how a row is added."""
        return [
            (statistic.add, self.sums[f"{kind}/{name}"])
            for kind, statistic in STATISTICS.items()
            if statistic.feed == feed and f"{kind}/{name}" in self.sums
        ]

    def _flat(self, x: Tensor) -> Tensor:  # (..., k) to (rows, k)
        return rows_of(x).to(self.dtype)


def _add(sums: list[tuple[Add, Tensor]], rows: Tensor) -> None:
    for add, total in sums:
        add(total, rows)
