"""Training of some parameters by AdamW with early stopping; a killed training goes on and ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofold.host.parts import take_part, write_part
from twofold.host.progress import progress, say
from twofold.model.frozen import frozen
from twofold.nn.compact import Compact
from twofold.refine import Stages

WARM_UP = 0.05  # share of the steps in which the rate rises
LAST_RATE = 0.05  # of the first, at the end of the cosine
CLIP = 1.0  # norm of the gradient, above which it is shortened
CHECKS = 8  # how often the held-out loss is taken
PATIENCE = 3  # checks without a gain, after which it stops
DIVERGED = 2.0  # times the loss at the beginning
SAVE_SECONDS = 120.0
DONE = "all steps were done"
PROBES = 2  # forward and backward, that are timed before the steps are counted


@dataclass(frozen=True)
class Trained:
    """How a training went."""

    steps: int
    planned: int
    windows: int  # seen, repeats counted
    before: float
    after: float
    seconds: float
    ended: str


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the factors, bases and parts, with the biases of their layers. All else is the dense model's too and stays."""
    factors = {id(p) for m in model.modules() if isinstance(m, Compact) for p in m.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in factors}


def round_to(parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> None:
    """Give parameters the precision in which they will be stored, so that what is measured is what is written."""
    for parameter in parameters.values():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)


@contextmanager
def training(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Let these parameters alone get gradients within the block, and keep them in float32.

    Dropout stays off: the aim is what the dense model gives.
    """
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    narrow = next((dtype for dtype in dtypes.values() if dtype in (torch.bfloat16, torch.float16)), None)
    with frozen(model):
        for parameter in parameters.values():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        device, dtype = next(model.parameters()).device.type, narrow or torch.bfloat16
        try:
            # No cache: it would hold on to the first cast of weights that change with every step.
            with torch.autocast(device, dtype=dtype, enabled=narrow is not None, cache_enabled=False):
                yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = parameter.data.to(dtypes[name])
                parameter.grad = None


@dataclass
class _State:
    """How far a training has come, and what it needs to go on: parameters, moments of the optimizer, the best parameters."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    path: Path | None
    mark: str
    about: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    saved_at: float = field(default_factory=time.monotonic)

    def begin(self, total: int, before: float) -> None:
        self.about = {"step": 0, "total": total, "before": before, "best": before, "since": 0, "spent": 0.0}
        self._keep()

    def look(self, loss: float) -> None:
        """Keep the parameters if they are the best so far."""
        if loss < self.about["best"]:
            self.about["best"], self.about["since"] = loss, 0
            self._keep()
        else:
            self.about["since"] += 1

    def _keep(self) -> None:
        self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Give the parameters their best values."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])

    def save(self, step: int, spent: float) -> None:
        """Write it down, every two minutes."""
        if self.path is None or time.monotonic() - self.saved_at <= SAVE_SECONDS:
            return
        tensors: dict[str, Tensor] = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            tensors[f"now/{name}"] = parameter.data
            state = self.optimizer.state[parameter]
            tensors[f"first/{name}"], tensors[f"second/{name}"] = state["exp_avg"], state["exp_avg_sq"]
        about = json.dumps({**self.about, "step": step, "spent": spent})
        write_part(self.path, tensors, self.mark, {"about": about})
        self.saved_at = time.monotonic()

    def load(self) -> bool:
        """Take up an earlier state; say whether there is a whole one that belongs here."""
        part = take_part(self.path, self.mark)
        if part is None:
            return False
        tensors, header = part
        self.about = json.loads(header["about"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"now/{name}"])
            self.best[name] = tensors[f"best/{name}"]
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.about["step"])),
                "exp_avg": tensors[f"first/{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"second/{name}"].to(parameter.device),
            }
        return True


def train(
    parameters: dict[str, nn.Parameter],
    loss_of: Callable[[Sequence[int]], Tensor],
    held_out: Callable[[], float],
    recipe: Stages,
    *,
    windows: int,
    together: int = 1,
    weigh: Callable[[Sequence[int]], float] = len,
    before: float | None = None,
    seconds: float | None = None,
    path: Path | None = None,
    mark: str = "",
    title: str = "Refining",
    data: str = "text",
    quiet: bool = False,
) -> Trained:
    """Lower a loss over windows, and leave the parameters that were best on held-out text.

    The rate of a parameter is relative to the size of its numbers: each step changes a weight by about ``refine_rate`` of its
    root mean square, so that factors of any scale need no rates of their own.

    Args:
        loss_of: the mean loss of some windows, with a graph.
        held_out: the loss that decides; lower is better.
        recipe: windows in a step, passes over all if the seconds suffice, or steps in the place of both; the rate; the seed.
        together: windows of a step at once; more take more memory.
        weigh: how much the mean of some windows counts beside that of others in a step.
        before: what ``held_out`` gives at the beginning, if it is known.
        seconds: that all may take. The number of steps is fixed by a probe at the beginning, and then never changes, but for a
            machine that slows down: at the limit the training ends.
        path: where the state is kept every two minutes.
        mark: what the state belongs to.
        data: what is held out, in a word.
    """
    began = time.monotonic()
    batch, rate, steps = recipe.refine_batch, recipe.refine_rate, recipe.refine_steps
    trained = list(parameters.values())
    optimizer = _optimizer(trained, rate)
    mark = f"{mark} {title} {windows} {batch} {recipe.refine_passes} {rate} {steps} {recipe.seed}"
    state = _State(parameters, optimizer, path, hashlib.sha256(mark.encode()).hexdigest())
    if not state.load():
        first = held_out() if before is None else before
        left = None if seconds is None or steps else seconds - (time.monotonic() - began)
        state.begin(steps or _steps_for(loss_of, held_out, recipe, windows, together, left), first)
    optimizer.zero_grad(set_to_none=True)
    about, total, step = state.about, int(state.about["total"]), int(state.about["step"])
    every = -(-total // CHECKS)
    ended, order = DONE, _order(windows, recipe.seed, step * batch)
    with progress(title, total, done=step, unit="steps", quiet=quiet) as tick:
        while step < total and ended == DONE:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * _scale(step, total)
            finite = _step(optimizer, trained, loss_of, list(islice(order, batch)), together, weigh)
            step += 1
            tick()
            spent = about["spent"] + time.monotonic() - began
            late = seconds is not None and steps is None and spent > seconds
            if step % every == 0 or step == total or late or not finite:
                loss = held_out() if finite else math.nan
                state.look(loss)
                ended = _end(about, loss, step, every, rate, data, late=late) or DONE
            if ended == DONE:
                state.save(step, spent)
    state.restore()
    if "diverged" in ended:
        say(f"{title}: {ended}")
    spent = about["spent"] + time.monotonic() - began
    return Trained(step, total, step * batch, about["before"], about["best"], spent, ended)


def _optimizer(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Return an optimizer with rates relative to the size of each parameter's numbers."""
    rates: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        size = float(parameter.detach().float().square().mean().sqrt())
        rates.setdefault(rate * max(size, 1e-3), []).append(parameter)
    groups = [{"params": members, "lr": base, "base": base} for base, members in rates.items()]
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    loss_of: Callable[[Sequence[int]], Tensor],
    windows: list[int],
    together: int,
    weigh: Callable[[Sequence[int]], float],
) -> bool:
    """Take a step on some windows; one whose loss is not finite is not taken.

    Returns:
        Whether it was taken.
    """
    total = 0.0
    for first in range(0, len(windows), together):
        part = windows[first : first + together]
        loss = loss_of(part) * (weigh(part) / weigh(windows))
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    if math.isfinite(total):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return math.isfinite(total)


def _end(about: dict[str, Any], now: float, step: int, every: int, rate: float, data: str, *, late: bool) -> str | None:
    """Say why the training ends at a step, None if it goes on."""
    total = int(about["total"])
    if not now <= DIVERGED * about["before"]:
        return f"it diverged at step {step} of {total} (rate {rate:g}); the best state was restored"
    if about["since"] >= PATIENCE and step < total:
        return f"no gain on held-out {data} since step {max(step - PATIENCE * every, 0)} of {total}"
    if late and step < total:
        return f"the time was over at step {step} of {total}"
    return None


def _steps_for(
    loss_of: Callable[[Sequence[int]], Tensor],
    held_out: Callable[[], float],
    recipe: Stages,
    windows: int,
    together: int,
    seconds: float | None,
) -> int:
    """Return the steps of the recipe's passes, or those that the seconds that are left suffice for."""
    batch = recipe.refine_batch
    total = max(round(recipe.refine_passes * windows / batch), 1)
    if seconds is None:
        return total
    began, together = time.monotonic(), min(together, batch)
    for i in range(PROBES):
        loss_of([(i * together + k) % windows for k in range(together)]).backward()  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    probed = time.monotonic()
    held_out()
    checked = time.monotonic()
    step = (probed - began) / PROBES / together * batch
    left = seconds - (checked - began) - CHECKS * (checked - probed)
    return max(min(total, int(0.97 * left / step)), 1)


def _scale(step: int, total: int) -> float:
    """Return the share of the rate at a step: linear warm-up, then a cosine."""
    warm = max(int(WARM_UP * total), 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    along = (step - warm) / max(total - warm, 1)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * along)) / 2


def seen(windows: int, seed: int, count: int) -> Iterator[int]:
    """Yield the first so many windows that a training sees."""
    return islice(_order(windows, seed, 0), count)


def _order(windows: int, seed: int, begin: int) -> Iterator[int]:
    """Yield the windows in the order of the steps from a place on: each pass has a random order of its own."""
    first, place = divmod(begin, windows)
    for number in count(first):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        yield from torch.randperm(windows, generator=generator).tolist()[place:]
        place = 0
