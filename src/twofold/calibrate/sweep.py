"""Moments from the calibration samples: forward for the inputs, backward for the gradients.

A model that fits in memory is one stretch: each batch goes forward and backward once. A larger one is worked through stretch
by stretch: forward over all samples, then backward, where each stretch but the last is computed once more from its stored input.
The arithmetic is the same, so both ways give the same sums.

The gradient at the outputs is random, so that E[g gᵀ] is the curvature of the loss (task/output). No weight gets a gradient: the
parameters are frozen, and the first layer that is watched starts the graph.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.calibrate.accumulate import Accumulator
from twofold.calibrate.moments import Moments
from twofold.calibrate.request import Request
from twofold.calibrate.states import KINDS, States, SweepStep, steps_of
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.host.files import make_folder
from twofold.host.progress import Tick, progress
from twofold.model.blocks import Stretch, body_of, run_stretch
from twofold.model.frozen import frozen
from twofold.model.streamed import Resident, units_of
from twofold.model.target import Target
from twofold.objectives import without_gradients
from twofold.task import Batch, Samples, Task, on_device
from twofold.task.output import Curvature
from twofold.task.output.curvature import stream

SAVE_SECONDS = 120.0  # how often an unfinished pass is saved


def collect_moments(
    residence: Resident,
    targets: list[Target],
    request: Request,
    samples: Samples,
    task: Task,
    *,
    empty: Moments,
    parts: list[Stretch] | None = None,
    before: frozenset[str] = frozenset(),
    seed: int = 0,
    curvature: Curvature = "sampled",
    draws: int = 1,
    batch_size: int = 1,
    weights: Mapping[str, Tensor] | None = None,
    folder: Path | None = None,
    on_disk: bool = False,
    quiet: bool = False,
) -> Moments:
    """Run the model over the samples and sum the moments that were asked for.

    Args:
        residence: a transformers model, and where its weights are; with outputs of the task, if gradients are asked for.
        empty: moments with groups, fingerprint and description but no sums yet.
        parts: the stretches of blocks that are in memory at once; the whole model if it is None.
        before: the modules that run before the first block.
        curvature: how it is estimated from a backward pass.
        draws: backward passes for each batch; several only where the whole model is one stretch.
        weights: the dense weights (out, in) that the moments are of, where the model has smaller ones in their places.
        seed: of the sampled labels; batch b uses its own stream, so a resumed pass gives the same sums.
        folder: where finished parts are written, and an unfinished pass is taken up again; in memory if it is None.
        on_disk: keep the hidden states between stretches in the folder, so that a killed run goes on from there.

    Raises:
        TwofoldError: if an activation is NaN or infinite (naming the first layer), or the model gives no logits.
    """
    if folder is not None:
        make_folder(folder)
    steps, spans = steps_of(parts or [Stretch()], request.backward), samples.spans(batch_size)
    spans = spans[slice(*processes.share(len(spans)))]
    first, last = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    states = States(steps, last - first, empty.fingerprint, folder, on_disk)
    sweep = _Sweep(
        residence, targets, request, samples, task, states, spans, first, seed, curvature, draws, weights or {}
    )
    sums: dict[str, Tensor] = {}
    begin, each = states.resume(), samples.units(first, last)
    done = each * begin + samples.units(first, first + states.done)
    with progress("Calibrating", each * len(steps), done=done, unit=samples.unit, quiet=quiet) as tick:
        for step in steps[begin:]:
            more = sweep.run(step, [t for t in targets if step.stretch.holds(t.name, before)], tick)
            if folder is None:
                sums |= more
    moments = replace(empty, sums=sums, predictions=samples.predictions)
    if folder is None:
        return moments
    if processes.is_main():
        moments.finish(folder, states.clean())
    processes.wait()
    return Moments.load(folder, empty.fingerprint)


@dataclass
class _Sweep:
    """A pass over all samples, stretch by stretch."""

    residence: Resident
    targets: list[Target]
    request: Request
    samples: Samples
    task: Task
    states: States
    spans: list[tuple[int, int]]  # batches of this process
    first: int  # sample of this process
    seed: int
    curvature: Curvature
    draws: int
    weights: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        model = self.residence.model
        # Inputs alone need no head, unless a target stands in it.
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.body = body_of(model) if all(t.name.startswith(prefix) for t in self.targets) else model

    def run(self, step: SweepStep, targets: list[Target], tick: Tick) -> dict[str, Tensor]:
        """Take one step over the samples of this process; return the sums over all processes."""
        stretch, backward, states = step.stretch, step.sweep != "forward", self.states
        starts = backward and stretch.is_first
        kinds = KINDS[step.sweep]
        accumulator = Accumulator(self.residence, targets, self.request, kinds, self.weights, starts=starts)
        for name, tensor in states.sums.items():
            accumulator.sums[name].copy_(tensor)
        begin, states.done, states.sums = self.first + states.done, 0, {}
        saved_at = time.monotonic()
        about = {"step": step.name, "shape": "", "dtype": ""}
        units = units_of(stretch, head=backward and stretch.is_last)
        with frozen(self.residence.model, accumulator.handles), self.residence.hold(units):
            for first, last in self.spans:
                if first < begin:
                    continue
                out = self._batch(step, first, last)
                for state in step.writes:
                    assert out is not None
                    states.of(*state).write(first - self.first, out)
                    about["shape"] = json.dumps(list(out.shape[1:]))
                    about["dtype"] = str(out.dtype).removeprefix("torch.")
                tick(self.samples.units(first, last))
                if last < self.spans[-1][1] and time.monotonic() - saved_at > SAVE_SECONDS:
                    states.save(accumulator.sums, about, last - self.first)
                    saved_at = time.monotonic()
        sums = {name: accumulator.sums[name] for name in sorted(accumulator.sums)}
        processes.add_up(sums.values())
        broken = next((name for name, tensor in sums.items() if not torch.isfinite(tensor).all()), None)
        if broken is not None:
            raise TwofoldError(
                f"the calibration gave NaN or infinity in {broken.partition('/')[2]}; try `dtype=float32`, or check its weights"
            )
        states.finish(step, sums, about, backward=self.request.backward)
        return sums

    def _batch(self, step: SweepStep, first: int, last: int) -> Tensor | None:
        """Run a stretch on one batch; return what the step leaves for others."""
        model, stretch, task = self.residence.model, step.stretch, self.task
        batch = on_device(self.samples.batch(first, last), self.residence.device, self.residence.dtype)
        here, there = first - self.first, last - self.first
        hidden = None
        if not stretch.is_first:
            hidden = self.states.of("hidden", stretch.first).read(here, there).to(self.residence.device)

        def run(whole: bool) -> Any:
            called = model if whole else self.body
            return run_stretch(lambda: task.call(called, batch), model, stretch, hidden)

        if step.sweep == "forward":
            with torch.no_grad():
                out = run(False)
                out = out if isinstance(out, Tensor) else out[0]
                _check_finite(out, model, partial(run, False))
                return None if stretch.is_last else out
        with torch.enable_grad():
            if hidden is not None:
                hidden.requires_grad_(True)
            out = run(step.sweep == "both")
            if step.sweep == "both":
                try:
                    outputs = task.read(out, batch, model)
                except TwofoldError as error:
                    raise TwofoldError(f"{error}; {without_gradients()}") from error
                if not outputs.requires_grad:
                    raise TwofoldError(
                        f"no gradient reaches the outputs of {type(model).__name__}; {without_gradients()}"
                    )
                _check_finite(outputs, model, partial(run, False))
                self._draw(outputs, batch, stream(self.seed, first))
            else:
                out.backward(self.states.of("gradient", stretch.last).read(here, there).to(out))
        return None if hidden is None else hidden.grad

    def _draw(self, outputs: Tensor, batch: Batch, generator: torch.Generator) -> None:
        """Go backward, once for each draw; the hooks sum what arrives, so each draw has its share of the second moment."""
        for left in reversed(range(self.draws)):
            probe = self.task.output.probe(outputs, self.task.labels(batch), generator, self.curvature)
            if self.draws > 1:
                probe = probe / self.draws**0.5
            outputs.backward(probe, retain_graph=left > 0)  # type: ignore[no-untyped-call]


def _check_finite(output: Tensor, model: nn.Module, run: Callable[[], Any]) -> None:
    """Refuse an output of a run that is not finite.

    Raises:
        TwofoldError: naming the first layer whose output is not finite.
    """
    if torch.isfinite(output).all():
        return
    broken: list[str] = []

    def look(name: str, module: nn.Module, args: Any, result: Any) -> None:
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, Tensor) and not torch.isfinite(first).all():
            broken.append(name)

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding) or not list(module.children()):
                hooks.enter_context(module.register_forward_hook(partial(look, name)))
        run()
    where = broken[0] if broken else "the last layer"
    raise TwofoldError(
        f"the activations hold NaN or infinity, first in {where}; try `dtype=float32`, or check its weights"
    )
