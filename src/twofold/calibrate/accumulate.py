"""Hooks on the targets that add to the sums of moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twofold.calibrate.request import SQUARE, Request
from twofold.model.streamed import Resident
from twofold.model.weights import Target

FORWARD = (
    "rows",
    "input",
    "input_mean",
    "output",
    "input_abs",
    "input_square",
    "input_trace",
)  # kinds of moments by the sweep that gives them


BACKWARD = ("gradient", "input_gradient", "gradient_trace", "gradient_square", "fisher_rows")


class Accumulator:
    """Hooks on the targets that add to the sums."""

    def __init__(
        self,
        residence: Resident,
        targets: list[Target],
        request: Request,
        kinds: tuple[str, ...],
        weights: Mapping[str, Tensor],
    ) -> None:
        """
        Args:
            weights: (out, in), by the names of targets in whose places other weights stand.
        """
        self.weights = weights
        self.device = residence.device
        self.dtype = torch.float64 if residence.dtype == torch.float64 else torch.float32
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, list[Tensor]] = {}
        here = {target.name for target in targets}
        for kind, names in request.sizes.items():
            for name, k in names.items():
                if kind not in kinds or name not in here:
                    continue
                shape = (k, k) if kind in SQUARE else () if kind == "rows" or kind.endswith("trace") else (k,)
                self.sums[f"{kind}/{name}"] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.handles: list[Any] = []
        for target in targets:
            module = residence.model.get_submodule(target.name)
            self.handles.append(module.register_forward_hook(self._forward(target.name)))
            if f"input_gradient/{target.name}" in self.sums and target.name not in weights:
                self.handles.append(module.register_full_backward_hook(self._backward(target.name)))

    def _add(self, key: str, rows: Tensor) -> None:  # rows (tokens, k)
        if key in self.sums:
            self.sums[key].addmm_(rows.T, rows)

    def _flat(self, x: Tensor) -> Tensor:  # (..., k) to (tokens, k)
        return x.detach().reshape(-1, x.shape[-1]).to(self.dtype)

    def _forward(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        wanted = [
            "gradient",
            "gradient_trace",
            "gradient_square",
            "fisher_rows",
            *(["input_gradient"] if name in self.weights else []),
        ]
        wants_gradient = any(f"{kind}/{name}" in self.sums for kind in wanted)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            with torch.no_grad():
                if f"rows/{name}" in self.sums:
                    self.sums[f"rows/{name}"] += args[0].numel() // max(args[0].shape[-1], 1)
                if any(
                    f"{kind}/{name}" in self.sums
                    for kind in ("input", "input_mean", "input_abs", "input_square", "input_trace")
                ) or (f"fisher_rows/{name}" in self.sums):
                    x = self._flat(args[0])
                    self._add(f"input/{name}", x)
                    if f"input_trace/{name}" in self.sums:
                        self.sums[f"input_trace/{name}"] += x.square().sum()
                    if f"input_mean/{name}" in self.sums:
                        self.sums[f"input_mean/{name}"] += x.sum(0)
                    if f"input_abs/{name}" in self.sums:
                        self.sums[f"input_abs/{name}"] += x.abs().sum(0)
                    if f"input_square/{name}" in self.sums:
                        self.sums[f"input_square/{name}"] += x.square().sum(0)
                    if f"fisher_rows/{name}" in self.sums:
                        self.squares.setdefault(name, []).append(x.square().sum(1))
                if f"output/{name}" in self.sums:
                    if name in self.weights:
                        y = self._flat(args[0]) @ self.weights[name].to(self.dtype).T
                    else:
                        bias = module.bias
                        y = self._flat(output - bias if isinstance(bias, Tensor) else output)
                    self._add(f"output/{name}", y)
            if wants_gradient and output.requires_grad:
                output.register_hook(lambda g: self._gradient(name, g))  # type: ignore[no-untyped-call]

        return hook

    def _gradient(self, name: str, gradient: Tensor) -> None:
        g = self._flat(gradient)
        self._add(f"gradient/{name}", g)
        if name in self.weights and f"input_gradient/{name}" in self.sums:
            self._add(f"input_gradient/{name}", g @ self.weights[name].to(self.dtype))
        if f"gradient_trace/{name}" in self.sums:
            self.sums[f"gradient_trace/{name}"] += g.square().sum()
        if f"gradient_square/{name}" in self.sums:
            self.sums[f"gradient_square/{name}"] += g.square().sum(0)
        if f"fisher_rows/{name}" in self.sums:
            self.sums[f"fisher_rows/{name}"] += self.squares[name].pop() @ g.square()

    def _backward(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, grad_input: tuple[Tensor | None, ...], grad_output: Any) -> None:
            if grad_input[0] is not None:
                self._add(f"input_gradient/{name}", self._flat(grad_input[0]))

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
