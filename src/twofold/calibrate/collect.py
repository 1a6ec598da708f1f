"""Moments in one pass over the calibration windows: forward for the inputs, backward for the gradients.

The labels of the loss are sampled from the model's own distribution, so that E[g gᵀ] is the true Fisher information at the
output. No weight gets a gradient: the parameters are frozen, and the embeddings' output starts the graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.calibrate.moments import Moments, Request
from twofold.calibrate.sample import draw
from twofold.errors import TwofoldError
from twofold.progress import progress
from twofold.targets import Target

SAVE_SECONDS = 120.0  # how often an unfinished pass is saved
ROWS = 128  # token positions whose labels are drawn at once


class _Accumulator:
    """Hooks on the targets that add to the sums."""

    def __init__(self, model: nn.Module, targets: list[Target], request: Request) -> None:
        parameter = next(model.parameters())
        self.device = parameter.device
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, list[Tensor]] = {}
        square = ("input", "output", "gradient", "input_gradient")
        for kind, names in request.sizes.items():
            for name, k in names.items():
                shape = (k, k) if kind in square else () if kind == "rows" or kind.endswith("trace") else (k,)
                self.sums[f"{kind}/{name}"] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.handles: list[Any] = []
        for target in targets:
            module = model.get_submodule(target.name)
            self.handles.append(module.register_forward_hook(self._forward(target.name)))
            if f"input_gradient/{target.name}" in self.sums:
                self.handles.append(module.register_full_backward_hook(self._backward(target.name)))

    def _add(self, key: str, rows: Tensor) -> None:  # rows (tokens, k)
        if key in self.sums:
            self.sums[key].addmm_(rows.T, rows)

    def _flat(self, x: Tensor) -> Tensor:  # (..., k) to (tokens, k)
        return x.detach().reshape(-1, x.shape[-1]).to(self.dtype)

    def _forward(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        wants_gradient = any(f"{kind}/{name}" in self.sums for kind in ("gradient", "gradient_trace", "fisher_rows"))

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            with torch.no_grad():
                self.sums[f"rows/{name}"] += args[0].numel() // max(args[0].shape[-1], 1)
                if any(f"{kind}/{name}" in self.sums for kind in ("input", "input_abs", "input_trace")) or (
                    f"fisher_rows/{name}" in self.sums
                ):
                    x = self._flat(args[0])
                    self._add(f"input/{name}", x)
                    if f"input_trace/{name}" in self.sums:
                        self.sums[f"input_trace/{name}"] += x.square().sum()
                    if f"input_abs/{name}" in self.sums:
                        self.sums[f"input_abs/{name}"] += x.abs().sum(0)
                    if f"fisher_rows/{name}" in self.sums:
                        self.squares.setdefault(name, []).append(x.square().sum(1))
                if f"output/{name}" in self.sums:
                    bias = module.bias
                    self._add(f"output/{name}", self._flat(output - bias if isinstance(bias, Tensor) else output))
            if wants_gradient and output.requires_grad:
                output.register_hook(lambda g: self._gradient(name, g))  # type: ignore[no-untyped-call]

        return hook

    def _gradient(self, name: str, gradient: Tensor) -> None:
        g = self._flat(gradient)
        self._add(f"gradient/{name}", g)
        if f"gradient_trace/{name}" in self.sums:
            self.sums[f"gradient_trace/{name}"] += g.square().sum()
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


def fisher_gradient(
    logits: Tensor,  # (batch, length, vocabulary)
    generator: torch.Generator,
) -> Tensor:  # the same shape
    """The gradient of the cross-entropy, summed over positions, for labels drawn from the model: p − onehot(y)."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probabilities = torch.softmax(logits.detach().to(wide), -1)
    flat = probabilities.view(-1, probabilities.shape[-1])
    for rows in torch.split(flat, ROWS):
        labels = draw(rows if rows.device.type == "cpu" else rows.cpu(), generator).to(rows.device)
        rows[torch.arange(len(rows), device=rows.device), labels] -= 1
    return probabilities.to(logits.dtype)


def collect_moments(
    model: Any,
    targets: list[Target],
    request: Request,
    windows: Tensor,  # (count, window), int64
    *,
    empty: Moments,
    seed: int = 0,
    batch_size: int = 1,
    partial: Path | None = None,
    quiet: bool = False,
) -> Moments:
    """Run the model over the windows and sum the moments that were asked for.

    Args:
        model: a transformers model with logits (if gradients are asked for), in evaluation mode.
        empty: moments with groups, fingerprint and description but no sums yet.
        seed: of the sampled labels; batch b uses its own stream, so a resumed pass gives the same sums.
        partial: where an unfinished pass is kept and taken up again.

    Raises:
        TwofoldError: if an activation is NaN or infinite (naming the first layer), or the model gives no logits.
    """
    accumulator = _Accumulator(model, targets, request)
    first = 0
    if partial is not None and partial.exists():
        try:
            saved = Moments.load(partial, empty.fingerprint)
            for name, tensor in saved.sums.items():
                accumulator.sums[name].copy_(tensor)
            first = saved.tokens // windows.shape[1]
        except TwofoldError:  # not whole or not ours: start again
            partial.unlink(missing_ok=True)
    was_grad = [(p, p.requires_grad) for p in model.parameters()]
    was_training = model.training
    model.eval()
    model.requires_grad_(False)
    # Inputs alone need no head, unless a target stands in it.
    prefix = str(getattr(model, "base_model_prefix", ""))
    inside = bool(prefix) and hasattr(model, prefix) and all(t.name.startswith(f"{prefix}.") for t in targets)
    body = getattr(model, prefix) if inside else model
    start_graph = None
    if request.backward:
        start_graph = model.get_input_embeddings().register_forward_hook(
            lambda m, a, output: output.requires_grad_(True)
        )
    saved_at = time.monotonic()
    try:
        total = windows.numel()
        with progress("Calibrating", total, done=first * windows.shape[1], unit="tokens", quiet=quiet) as tick:
            for begin in range(first, len(windows), batch_size):
                batch = windows[begin : begin + batch_size].to(accumulator.device)
                generator = torch.Generator().manual_seed(seed * 1_000_003 + begin)
                _pass(model, body, batch, request.backward, generator)
                tick(batch.numel())
                done = min(begin + batch_size, len(windows))
                if partial is not None and done < len(windows) and time.monotonic() - saved_at > SAVE_SECONDS:
                    replace(empty, sums=accumulator.sums, tokens=done * windows.shape[1]).save(partial)
                    saved_at = time.monotonic()
    finally:
        accumulator.remove()
        if start_graph is not None:
            start_graph.remove()
        for parameter, required in was_grad:
            parameter.requires_grad_(required)
        model.train(was_training)
    moments = replace(empty, sums=accumulator.sums, tokens=windows.numel())
    broken = moments.first_not_finite()
    if broken is not None:
        raise TwofoldError(
            f"the calibration gave NaN or infinity in {broken.partition('/')[2]}; try --dtype float32, or check its weights"
        )
    if partial is not None:
        partial.unlink(missing_ok=True)
    return moments


def _pass(model: Any, body: Any, batch: Tensor, backward: bool, generator: torch.Generator) -> None:
    if not backward:
        with torch.no_grad():
            _check(model, batch, body(input_ids=batch, **_no_cache(model))[0])
        return
    with torch.enable_grad():
        logits = getattr(model(input_ids=batch, **_no_cache(model)), "logits", None)
        if logits is None or logits.dim() != 3:
            raise TwofoldError(
                "this model gives no token logits, which the gradient moments need; use --objective svd-llm"
            )
        if not logits.requires_grad:
            raise TwofoldError(f"no gradient reaches the logits of {type(model).__name__}; use --objective svd-llm")
        _check(model, batch, logits)
        logits.backward(fisher_gradient(logits, generator))


def _no_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def _check(model: nn.Module, batch: Tensor, output: Tensor) -> None:
    """Name the first layer whose output is not finite."""
    if torch.isfinite(output).all():
        return
    broken: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            first = result[0] if isinstance(result, tuple) else result
            if not broken and isinstance(first, Tensor) and not torch.isfinite(first).all():
                broken.append(name)

        return hook

    leaves = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D | nn.Embedding) or not list(m.children())
    ]
    handles = [m.register_forward_hook(watch(name)) for name, m in leaves]
    try:
        with torch.no_grad():
            model(input_ids=batch)
    finally:
        for handle in handles:
            handle.remove()
    where = broken[0] if broken else "the last layer"
    raise TwofoldError(
        f"the activations hold NaN or infinity, first in {where}; try --dtype float32, or check its weights"
    )
