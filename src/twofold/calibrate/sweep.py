"""Moments from the calibration samples: forward for the inputs, backward for the gradients.

A model that fits in memory is one stretch: each batch goes forward and backward once. A larger one is worked through stretch
by stretch: forward over all samples, then backward, where each stretch but the last is computed once more from its stored input.
The arithmetic is the same, so both ways give the same sums.

The gradient at the outputs is random, so that E[g gᵀ] is the curvature of the loss (task/output). No weight gets a gradient: the
parameters are frozen, and the first layer that is watched starts the graph.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.calibrate.accumulate import Accumulator
from twofold.calibrate.activations import Activations
from twofold.calibrate.moments import Moments
from twofold.calibrate.request import Request
from twofold.calibrate.statistics import BACKWARD, FORWARD
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.host.files import make_folder
from twofold.host.parts import Parts, read_names, write_part
from twofold.host.progress import Tick, progress
from twofold.model.blocks import Stretch, run_stretch
from twofold.model.frozen import frozen
from twofold.model.streamed import Resident, units_of
from twofold.model.target import Target
from twofold.objectives import without_gradients
from twofold.task import Samples, Task, on_device
from twofold.task.output import Curvature
from twofold.task.output.curvature import stream

SAVE_SECONDS = 120.0  # how often an unfinished pass is saved
OURS = re.compile(
    r"(forward|backward|both)-\d+-\d+\.safetensors|\.progress\.\d+\.safetensors|(hidden|gradient)-\d+\.\d+\.state|\..*\.\d+\.tmp"
)


@dataclass(frozen=True)
class _Step:
    """One sweep over one stretch of blocks."""

    sweep: Literal["forward", "backward", "both"]
    stretch: Stretch

    @property
    def name(self) -> str:
        return f"{self.sweep}-{self.stretch.first:04d}-{self.stretch.last:04d}"

    @property
    def kinds(self) -> tuple[str, ...]:
        return {"forward": FORWARD, "backward": BACKWARD, "both": FORWARD + BACKWARD}[self.sweep]


def _steps(parts: list[Stretch], backward: bool) -> list[_Step]:
    if not backward:
        return [_Step("forward", part) for part in parts]
    first: list[_Step] = [_Step("forward", part) for part in parts[:-1]]
    return [*first, _Step("both", parts[-1]), *(_Step("backward", part) for part in reversed(parts[:-1]))]


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
        weights: the dense weights (out, in) that the moments are of, where the model has smaller ones in their places.
        seed: of the sampled labels; batch b uses its own stream, so a resumed pass gives the same sums.
        folder: where finished parts are written, and an unfinished pass is taken up again; in memory if it is None.
        on_disk: keep the hidden states between stretches in the folder, so that a killed run goes on from there.

    Raises:
        TwofoldError: if an activation is NaN or infinite (naming the first layer), or the model gives no logits.
    """
    steps = _steps(parts or [Stretch()], request.backward)
    sweep = _Sweep(
        residence,
        targets,
        request,
        samples,
        task,
        steps,
        empty.fingerprint,
        seed,
        curvature,
        batch_size,
        weights or {},
        folder,
        on_disk,
    )
    found: dict[str, Tensor] = {}
    with frozen(residence.model):
        begin = sweep.resume()
        each = samples.units(sweep.first, sweep.last)
        done = each * begin + samples.units(sweep.first, sweep.first + sweep.done)
        with progress("Calibrating", each * len(steps), done=done, unit=samples.unit, quiet=quiet) as tick:
            for step in steps[begin:]:
                sums = sweep.run(step, [t for t in targets if step.stretch.holds(t.name, before)], tick)
                if folder is None:
                    found |= sums
    moments = replace(empty, sums=found, predictions=samples.predictions)
    if folder is None:
        return moments
    if processes.is_main():
        sweep.clean()
        moments.finish(folder, [f"{step.name}.safetensors" for step in steps])
    processes.wait()
    return Moments.load(folder, empty.fingerprint)


class _Sweep:
    """The state of a pass over all samples, stretch by stretch."""

    def __init__(
        self,
        residence: Resident,
        targets: list[Target],
        request: Request,
        samples: Samples,
        task: Task,
        steps: list[_Step],
        fingerprint: str,
        seed: int,
        curvature: Curvature,
        batch_size: int,
        weights: Mapping[str, Tensor],
        folder: Path | None,
        on_disk: bool,
    ) -> None:
        self.residence, self.request, self.samples, self.task, self.steps = residence, request, samples, task, steps
        self.seed, self.curvature, self.batch_size, self.folder = seed, curvature, batch_size, folder
        self.weights = weights
        self.fingerprint = fingerprint
        self.way = f"{processes.world()} processes" + (", hidden states on disk" if on_disk else "")
        spans = samples.spans(batch_size)
        first, last = processes.share(len(spans))
        self.spans = spans[first:last]
        self.first, self.last = (self.spans[0][0], self.spans[-1][1]) if self.spans else (0, 0)
        self.done = 0  # samples of the first step that are summed already
        self.on_disk = on_disk and folder is not None
        self.states: dict[str, Activations] = {}
        self.resumed: dict[str, Tensor] = {}
        model = residence.model
        # Inputs alone need no head, unless a target stands in it.
        prefix = str(getattr(model, "base_model_prefix", ""))
        inside = bool(prefix) and hasattr(model, prefix) and all(t.name.startswith(f"{prefix}.") for t in targets)
        self.body = getattr(model, prefix) if inside else model
        if folder is not None:
            make_folder(folder)

    @property
    def count(self) -> int:
        """The samples of this process."""
        return self.last - self.first

    def _state(self, kind: str, place: int) -> Activations:
        """The hidden states (or gradients) that go into a block."""
        name = f"{kind}-{place:04d}"
        if name not in self.states:
            path = None
            if self.on_disk and self.folder is not None:
                path = self.folder / f"{name}.{processes.rank()}.state"
            self.states[name] = Activations(self.count, path)
        return self.states[name]

    def _progress_file(self) -> Path | None:
        return None if self.folder is None else self.folder / f".progress.{processes.rank()}.safetensors"

    def _part(self, step: _Step) -> Path:
        assert self.folder is not None
        return self.folder / f"{step.name}.safetensors"

    def resume(self) -> int:
        """Find the step to begin with, and what is left of it."""
        if self.folder is None:
            return 0
        if not self.on_disk and len(self.steps) > 1:
            return 0  # the hidden states were in memory
        begin = 0
        for step in self.steps:
            about = self._described(self._part(step))
            if about is None:
                break
            self._shaped(step, about)
            begin += 1
        begin = processes.least(begin)
        needed = [a for step in self.steps[begin:] for a in self._needed(step, self.steps[:begin])]
        if not processes.agree(all(self._state(*one).whole(self.count) for one in needed)):
            begin = 0
        progress_file = self._progress_file()
        about = self._described(progress_file) if progress_file is not None else None
        mine = about is not None and begin < len(self.steps) and about["step"] == self.steps[begin].name
        if not processes.agree(mine) or about is None or progress_file is None:
            return begin
        self._shaped(self.steps[begin], about)
        done = int(about["windows"])
        if not processes.agree(all(self._state(*one).whole(done) for one in self._written(self.steps[begin]))):
            return begin
        self.done = done
        self.resumed = {
            name: Parts({name: progress_file})[name] for name in read_names(progress_file, self.fingerprint)[0]
        }
        return begin

    def _shaped(self, step: _Step, about: dict[str, str]) -> None:
        """Tell the states that an earlier process left what they hold."""
        for kind, place in self._written(step):
            if about["shape"]:
                self._state(kind, place).shaped(tuple(json.loads(about["shape"])), getattr(torch, about["dtype"]))

    def _described(self, path: Path) -> dict[str, str] | None:
        """What the header of a part says; None if it is not whole, not ours, or made in another way."""
        try:
            about = read_names(path, self.fingerprint)[1]
        except TwofoldError:
            return None
        return about if about.get("way") == self.way else None

    @staticmethod
    def _written(step: _Step) -> list[tuple[str, int]]:
        """The states that a step leaves for others."""
        if step.sweep == "forward":
            return [] if step.stretch.is_last else [("hidden", step.stretch.last)]
        return [] if step.stretch.is_first else [("gradient", step.stretch.first)]

    def _needed(self, step: _Step, finished: list[_Step]) -> list[tuple[str, int]]:
        """The states that a step reads and that finished steps have left."""
        reads = [] if step.stretch.is_first else [("hidden", step.stretch.first)]
        if step.sweep == "backward":
            reads.append(("gradient", step.stretch.last))
        left = [one for done in finished for one in self._written(done)]
        return [one for one in reads if one in left]

    def run(self, step: _Step, targets: list[Target], tick: Tick) -> dict[str, Tensor]:
        """One step over the samples of this process; gives the sums over all processes."""
        stretch, backward = step.stretch, step.sweep != "forward"
        starts = backward and stretch.is_first
        accumulator = Accumulator(self.residence, targets, self.request, step.kinds, self.weights, starts=starts)
        for name, tensor in self.resumed.items():
            accumulator.sums[name].copy_(tensor)
        begin, self.done, self.resumed = self.first + self.done, 0, {}
        saved_at = time.monotonic()
        about = {"way": self.way, "step": step.name, "shape": "", "dtype": ""}
        try:
            with self.residence.hold(units_of(stretch, head=backward and stretch.is_last)):
                for first, last in self.spans:
                    if first < begin:
                        continue
                    out = self._batch(step, first, last)
                    for kind, place in self._written(step):
                        assert out is not None
                        self._state(kind, place).write(first - self.first, out)
                        about |= {
                            "shape": json.dumps(list(out.shape[1:])),
                            "dtype": str(out.dtype).removeprefix("torch."),
                        }
                    tick(self.samples.units(first, last))
                    path = self._progress_file()
                    if path is not None and last < self.last and time.monotonic() - saved_at > SAVE_SECONDS:
                        write_part(
                            path, accumulator.sums, self.fingerprint, {**about, "windows": str(last - self.first)}
                        )
                        saved_at = time.monotonic()
        finally:
            accumulator.remove()
        sums = {name: accumulator.sums[name] for name in sorted(accumulator.sums)}
        processes.add_up(sums.values())
        broken = next((name for name, tensor in sums.items() if not torch.isfinite(tensor).all()), None)
        if broken is not None:
            raise TwofoldError(
                f"the calibration gave NaN or infinity in {broken.partition('/')[2]}; try `dtype=float32`, or check its weights"
            )
        if self.folder is not None and processes.is_main():
            write_part(self._part(step), sums, self.fingerprint, about)
        processes.wait()
        self._drop(step)
        return sums

    def _drop(self, step: _Step) -> None:
        """Remove what no later step reads."""
        stretch = step.stretch
        if step.sweep != "forward" or not self.request.backward:
            self._state("hidden", stretch.first).remove()
        if step.sweep == "backward":
            self._state("gradient", stretch.last).remove()
        path = self._progress_file()
        if path is not None:
            path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what finished and abandoned passes left in the folder; nothing of another name is touched."""
        assert self.folder is not None
        parts = {f"{step.name}.safetensors" for step in self.steps}
        for path in self.folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in parts:
                path.unlink(missing_ok=True)

    def _batch(self, step: _Step, first: int, last: int) -> Tensor | None:
        """Run a stretch on one batch; gives what the step leaves for others."""
        model, stretch, task = self.residence.model, step.stretch, self.task
        batch = on_device(self.samples.batch(first, last), self.residence.device)
        here, there = first - self.first, last - self.first
        hidden = None
        if not stretch.is_first:
            hidden = self._state("hidden", stretch.first).read(here, there).to(self.residence.device)

        def run(whole: bool) -> Any:
            called = model if whole else self.body
            return run_stretch(lambda: task.call(called, batch), model, stretch, hidden)

        if step.sweep == "forward":
            with torch.no_grad():
                out = run(False)
                out = out if isinstance(out, Tensor) else out[0]
                self._check(out, run)
                return None if stretch.is_last else out
        with torch.enable_grad():
            if hidden is not None:
                hidden.requires_grad_(True)
            out = run(step.sweep == "both")
            if step.sweep == "both":
                outputs = task.read(out, model)
                if not outputs.requires_grad:
                    raise TwofoldError(
                        f"no gradient reaches the outputs of {type(model).__name__}; {without_gradients()}"
                    )
                self._check(outputs, run)
                generator = stream(self.seed, first)
                outputs.backward(task.output.probe(outputs, task.labels(batch), generator, self.curvature))  # type: ignore[no-untyped-call]
            else:
                gradient = self._state("gradient", stretch.last).read(here, there).to(out)
                out.backward(gradient)
        return None if hidden is None else hidden.grad

    def _check(self, output: Tensor, run: Callable[[bool], Any]) -> None:
        """Name the first layer whose output is not finite."""
        if torch.isfinite(output).all():
            return
        where = _first_broken(self.residence.model, lambda: run(False))
        raise TwofoldError(
            f"the activations hold NaN or infinity, first in {where}; try `dtype=float32`, or check its weights"
        )


def _first_broken(model: nn.Module, run: Callable[[], Any]) -> str:
    """The name of the first layer whose output is not finite."""
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
            run()
    finally:
        for handle in handles:
            handle.remove()
    return broken[0] if broken else "the last layer"
