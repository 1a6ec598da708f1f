"""A step against the gradient of the divergence, in closed form, that leaves every rank as it is.

The closed form treats each layer alone, and by moments of some ten thousand tokens. Here the factored model is run over the
tokens once more, with the gradient D = E[g x̂ᵀ] of KL(dense ‖ factored) by every whole weight W' of its own, with C = E[x̂ x̂ᵀ]
and G = E[g gᵀ]. In K-FAC's coordinates W̃ = G^½ W' C^½ the natural gradient is the plain one, D̃ = G^-½ D C^-½ (Martens & Grosse
2015); G is that of the very gradients that are followed, not of sampled labels: it measured as well, and needs no pass of its
own. Of it is taken:

1. What two halves of the tokens agree on. The rest is scatter of the text. In the eigenbases of G and C, cut into eight parts by
   rank, each of the 64 blocks is multiplied by Σ D̃₁D̃₂ / Σ ((D̃₁ + D̃₂)/2)², between 0 and 1: Wiener's filter, with the spectra
   estimated from the halves.
2. What does not raise the rank to first order: the projection on the tangent space of the matrices of rank r at W̃.
3. As far as it helps: one number for the whole model, by a search on held-out text.

The result is cut to rank r again in the same coordinates. One projected gradient update after the cut, and a second cut, are
ZS-SVD's (arXiv 2602.02848); the curvature, the filter and the search are ours.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from twofold.calibrate.frozen import start_graph
from twofold.calibrate.moments import Parts, read_names, write_part
from twofold.checkpoint.write import check_space
from twofold.errors import TwofoldError
from twofold.files import make_folder
from twofold.linalg.metric import eigen, working_dtype
from twofold.nn import FactoredLinear
from twofold.plan import PlanEntry
from twofold.progress import progress, say
from twofold.refine.base import Refined, Task, refinement
from twofold.refine.kept import Solved, keep_layers, take_layers
from twofold.refine.likeness import Likeness
from twofold.refine.training import training
from twofold.targets import replace_module

DAMPING = 0.03  # added to the eigenvalues of both moments, relative to their mean
PARTS = 8  # of the eigenvalues of each moment, for the filter
FIRST = 0.2  # share of the loss that the first step of the search would take off if the loss were linear
GROWTH = 1.4  # of the step, as long as it helps
TRIALS = 5  # about so many does the search take
HALVINGS = 4  # of a first step that does harm, before the search is given up


@dataclass
class Sums:
    """What one run over half of the windows adds up, by layer; those with one input have one moment of it."""

    gradients: dict[str, Tensor] = field(default_factory=dict)  # Σ g xᵀ (m, n)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # Σ g gᵀ (m, m)
    inputs: dict[str, Tensor] = field(default_factory=dict)  # leader → Σ x xᵀ (n, n)
    rows: dict[str, Tensor] = field(default_factory=dict)  # leader → how many inputs it was given

    def tensors(self) -> dict[str, Tensor]:
        """All by the names that they have on disk."""
        kinds = {"gradient": self.gradients, "output": self.outputs, "input": self.inputs, "rows": self.rows}
        return {f"{kind}/{name}": tensor for kind, some in kinds.items() for name, tensor in some.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Sums:
        sums = cls()
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            owner = {"gradient": sums.gradients, "output": sums.outputs, "input": sums.inputs, "rows": sums.rows}[kind]
            owner[name] = tensor
        return sums


@dataclass(frozen=True)
class Basis:
    """The eigenvectors of a moment and the square roots of its damped eigenvalues, ascending."""

    vectors: Tensor  # (k, k)
    roots: Tensor  # (k,)

    @classmethod
    def of(cls, moment: Tensor, damping: float) -> Basis:
        values, vectors = eigen(moment)
        values = values.clamp_min(0)
        return cls(vectors, (values + damping * values.mean()).clamp_min(torch.finfo(values.dtype).tiny).sqrt())


@dataclass(frozen=True)
class Step:
    """A layer in K-FAC's coordinates, and where to go from it."""

    weight: Tensor  # W̃ (m, n)
    direction: Tensor  # (m, n), in the tangent space
    left: Tensor  # (m, m), takes the outputs' coordinates back
    right: Tensor  # (n, n), takes the inputs' coordinates back, from the right; one for all layers of an input
    agreed: (
        float  # ⟨direction by one half, gradient by the other⟩: how fast the loss falls, without the scatter's share
    )


def natural_step(
    weight: Tensor,  # W' (m, n), of rank r
    halves: tuple[Tensor, Tensor],  # the gradient by each half of the tokens (m, n)
    outputs: Basis,  # of G (m, m)
    inputs: Basis,  # of C (n, n)
    rank: int,
) -> Step:
    """Where to move a weight, in the coordinates of the eigenbases."""

    def turn(matrix: Tensor) -> Tensor:
        return outputs.vectors.T @ matrix @ inputs.vectors

    row, column = outputs.roots[:, None], inputs.roots[None, :]
    own = row * turn(weight) * column
    first, second = (turn(half) / row / column for half in halves)
    share = agreement(first, second)
    left, right = _spaces(own, rank)
    filtered = [on_tangent(half * share, left, right) for half in (first, second)]
    return Step(
        own,
        (filtered[0] + filtered[1]) / 2,
        outputs.vectors / outputs.roots,
        (inputs.vectors / inputs.roots).T,
        float((filtered[0] * second).sum() + (filtered[1] * first).sum()) / 2,
    )


def agreement(first: Tensor, second: Tensor, parts: int = PARTS) -> Tensor:  # (m, n)
    """How much of each block of their mean two noisy matrices agree on, between 0 and 1."""
    rows, columns = (torch.arange(k, device=first.device) * parts // k for k in first.shape)
    block = (rows[:, None] * parts + columns[None, :]).flatten()

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(parts * parts).index_add_(0, block, values.flatten())

    whole = summed(((first + second) / 2).square())
    share = (summed(first * second) / whole.clamp_min(torch.finfo(whole.dtype).tiny)).clamp(0, 1)
    return share[block].view(first.shape)


def _spaces(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:  # (m, r) and (n, r)
    """Orthonormal bases of the columns and the rows of a matrix of rank r, by the eigenvectors of its smaller Gram matrix."""
    if matrix.shape[0] <= matrix.shape[1]:
        left = eigen(matrix @ matrix.T)[1][:, -rank:]
        return left, torch.linalg.qr(matrix.T @ left)[0]
    right = eigen(matrix.T @ matrix)[1][:, -rank:]
    return torch.linalg.qr(matrix @ right)[0], right


def on_tangent(
    matrix: Tensor,  # (m, n)
    left: Tensor,  # (m, r), orthonormal
    right: Tensor,  # (n, r), orthonormal
) -> Tensor:
    """The nearest matrix in the tangent space of the matrices of rank r at one with these column and row spaces."""
    inside = left @ (left.T @ matrix)
    return inside + (matrix - inside) @ right @ right.T


def stepped(step: Step, size: float, rank: int) -> tuple[Tensor, Tensor]:  # (m, r) and (r, n)
    """The factors of the weight after a step, cut to its rank in the same coordinates; in the weight's own ones."""
    wide = working_dtype(step.weight.device)
    moved = step.weight.to(wide) - size * step.direction.to(wide)
    if moved.shape[0] <= moved.shape[1]:
        left = eigen(moved @ moved.T)[1][:, -rank:]
        right = left.T @ moved
    else:
        right = eigen(moved.T @ moved)[1][:, -rank:].T
        left = moved @ right.T
    return step.left.to(wide) @ left, right @ step.right.to(wide)


@refinement("natural-gradient")
def natural_gradient(task: Task) -> Refined:
    """Take a step for each round, as large as held-out text says.

    Raises:
        TwofoldError: if the model gives no token logits, or a gradient is not finite.
    """
    began = time.monotonic()
    if task.folder is not None:
        make_folder(task.folder)
    layers = {n: m for n in task.replaced if isinstance(m := task.model.get_submodule(n), FactoredLinear)}
    others = len(task.replaced) - len(layers)
    if others:
        note = f"natural-gradient: {others} layers are no two plain factors, and stay as they are"
        task.plan.notes.append(note)
        if not task.quiet:
            say(note)
    loss = Likeness(task)
    rounds, done = task.recipe.refine_rounds, 0
    before = after = math.nan
    ended = "closed form"
    spent = time.monotonic() - began
    moved: set[str] = set()
    for number in range(rounds):
        mark = hashlib.sha256(f"{task.mark} {task.recipe.refine_labels} round {number}".encode()).hexdigest()
        path = None if task.folder is None else task.folder / f"round-{number}.safetensors"
        known = take_layers(path, mark, task)
        start = time.monotonic()
        if known is None:
            known = _round(task, loss, list(layers), number, mark)
            known.figures["seconds"] = time.monotonic() - start
            if path is not None:
                keep_layers(path, mark, known, task)
                for half in (0, 1):
                    _half_path(task, number, half).unlink(missing_ok=True)
        places = {entry.name: i for i, entry in enumerate(task.plan.entries)}
        for entry in known.entries:
            task.plan.entries[places[entry.name]] = entry
        task.plan.notes.extend(known.notes)
        before = known.figures["before"] if number == 0 else before
        after = known.figures["after"]
        if not known.figures["step"]:
            agreed = known.figures["agreed"] > 0
            ended = (
                f"no step of round {number + 1} helps on held-out text"
                if agreed
                else f"the two halves of the tokens agree on no step of round {number + 1}"
            )
            break
        done += 1
        moved |= {entry.name for entry in known.entries}
        spent += known.figures["seconds"]
        if task.seconds is not None and number + 1 < rounds and spent + known.figures["seconds"] > task.seconds:
            ended = f"another round would take longer than there is time, so it ended after round {number + 1}"
            break
    return Refined(
        method="natural-gradient",
        steps=done,
        planned=rounds,
        tokens=done * task.windows.numel(),
        parameters=sum(p.numel() for name in moved for p in task.model.get_submodule(name).parameters()),
        seconds=time.monotonic() - began,
        unit="nats",
        loss_before=before,
        loss_after=after,
        ended=ended,
    )


def _round(task: Task, loss: Likeness, names: list[str], number: int, mark: str) -> Solved:
    """One gradient and one step."""
    with training(task.model, {}):
        before = loss.held_out()
        halves = [_half(task, loss, names, number, half, mark) for half in (0, 1)]
        windows = [sum(len(part) for part in _half_of(task, loss, half)) for half in (0, 1)]
        mean = sum(total for _, total in halves) / sum(windows)
        steps = _steps(task, names, [sums for sums, _ in halves], [count * task.windows.shape[1] for count in windows])
        agreed = sum(step.agreed for step in steps.values())
        entries = {e.name: e for e in task.plan.entries}
        made: dict[str, PlanEntry] = {}
        held: set[str] = set()
        old: dict[str, FactoredLinear] = {name: task.model.get_submodule(name) for name in steps}

        def put(size: float) -> None:
            held.clear()
            made.clear()
            for name, step in steps.items():
                layer = _layer(step, size, old[name], task.loaded.stored_dtype)
                if layer is None:
                    held.add(name)
                    layer = old[name]
                else:
                    made[name] = entries[name].model_copy(update={"form": layer.form})
                replace_module(task.model, name, layer)

        def trial(size: float) -> float:
            put(size)
            return loss.held_out()

        size, after = 0.0, before
        if agreed > 0:
            with torch.no_grad(), progress("Searching the step", TRIALS, unit="trials", quiet=task.quiet) as tick:
                size, after = search(trial, before, FIRST * mean / agreed, tick)
                if size:
                    put(size)  # the search has gone on from it
        if not size:
            for name, module in old.items():
                replace_module(task.model, name, module)
            made = {}
    notes = []
    if len(_half_of(task, loss, 0)) == len(task.windows) == 1:
        notes.append(
            "natural-gradient: one window alone has no halves to compare, so nothing of the gradient is filtered out"
        )
    without = sorted(set(names) - steps.keys())
    if without:
        notes.append(
            f"natural-gradient: {len(without)} layers get no gradient from the calibration text, and stay as they are, "
            f"first {without[0]}"
        )
    if size and held:
        notes.append(
            f"natural-gradient: {len(held)} layers had no bounded gauge form after the step, and stay as they were, "
            f"first {min(held)}"
        )
    return Solved(
        entries=list(made.values()),
        notes=notes,
        figures={"before": before, "after": after, "step": size, "agreed": agreed},
    )


def search(
    trial: Callable[[float], float], before: float, first: float, tick: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """A step that lowers a loss more than its neighbours do, and that loss; 0 and the loss before, if none lowers it.

    It grows as long as that helps, and if it does not, it shrinks as long as that does; a first step that does harm is halved.
    """

    def tried(size: float) -> float:
        loss = trial(size)
        tick()
        return loss

    best, low = 0.0, before
    for halved in range(HALVINGS + 1):
        now = tried(first / 2**halved)
        if now < low:
            best, low = first / 2**halved, now
            break
    if not best:
        return best, low
    began = best
    for factor in (GROWTH, 1 / GROWTH):
        while (now := tried(best * factor)) < low:
            best, low = best * factor, now
        if best != began:
            break
    return best, low


def _half(task: Task, loss: Likeness, names: list[str], number: int, half: int, mark: str) -> tuple[Sums, float]:
    """What every other step over the windows adds up, and the sum of their losses; those of an earlier run if there are any."""
    path = None if task.folder is None else _half_path(task, number, half)
    if path is not None and path.is_file():
        try:
            kept, about = read_names(path, mark)
            parts = Parts(dict.fromkeys(kept, path))
            return Sums.of({name: parts[name].to(task.model.device) for name in kept}), float(about["loss"])
        except (TwofoldError, KeyError, ValueError):
            path.unlink()
    sums, total = Sums(), 0.0
    steps = _half_of(task, loss, half)
    windows = sum(len(part) for part in steps)
    leaders = {entry.name: entry.group for entry in task.plan.entries}
    with (
        progress(f"Gradient, half {half + 1} of 2", windows, unit="windows", quiet=task.quiet) as tick,
        _adding(task.model, names, leaders, sums),
    ):
        for part in steps:
            one = loss(part.tolist())
            (one * len(part) * task.windows.shape[1]).backward()  # type: ignore[no-untyped-call]
            total += float(one.detach()) * len(part)
            tick(len(part))
    for name, tensor in sums.tensors().items():
        if not torch.isfinite(tensor).all():
            raise TwofoldError(
                f"the {name.partition('/')[0]} moment of {name.partition('/')[2]} in the factored model is NaN or infinite; "
                "keep more of it, or leave natural-gradient out"
            )
    if path is not None:
        check_space(path.parent, sum(t.numel() * t.element_size() for t in sums.tensors().values()))
        write_part(path, sums.tensors(), mark, {"loss": repr(total)})
    return sums, total


def _half_of(task: Task, loss: Likeness, half: int) -> tuple[Tensor, ...]:
    """Every other step over the windows; one window alone is both halves."""
    steps = torch.split(torch.arange(len(task.windows)), loss.together if len(task.windows) > loss.together else 1)
    return steps[half::2] or steps


def _half_path(task: Task, number: int, half: int) -> Path:
    assert task.folder is not None
    return task.folder / f"gradient-{number}-{half}.safetensors"


@contextmanager
def _adding(model: nn.Module, names: list[str], leaders: dict[str, str], sums: Sums) -> Iterator[None]:
    """Within the block each backward pass adds what the layers were given and what came back to the sums."""
    taken: dict[str, str] = {}  # leader → the first layer of that input that is called

    def add(into: dict[str, Tensor], key: str, left: Tensor, right: Tensor) -> None:
        if key not in into:
            into[key] = left.new_zeros(left.shape[1], right.shape[1])
        into[key].addmm_(left.T, right)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watched(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            if not output.requires_grad:
                output.requires_grad_(True)  # no weight asks for gradients, and this model's embeddings can't
            x = _rows(inputs[0])
            leader = leaders[name]
            if taken.setdefault(leader, name) == name:
                add(sums.inputs, leader, x, x)
                sums.rows[leader] = sums.rows.get(leader, torch.zeros((), dtype=torch.int64)) + len(x)

            def came_back(gradient: Tensor) -> None:
                g = _rows(gradient)
                add(sums.gradients, name, g, x)
                add(sums.outputs, name, g, g)

            output.register_hook(came_back)  # type: ignore[no-untyped-call]

        return watched

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with suppress(NotImplementedError, AttributeError):  # a model of several inputs
        handles.append(start_graph(model))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(values: Tensor) -> Tensor:  # (rows, width)
    flat = values.detach().flatten(0, -2)
    return flat if flat.dtype == torch.float64 else flat.float()


def _steps(task: Task, names: list[str], halves: list[Sums], tokens: list[int]) -> dict[str, Step]:
    """Where each layer goes; sums, of so many tokens each, are given up as they are used."""
    both = sum(tokens)
    leaders = {entry.name: entry.group for entry in task.plan.entries}
    steps: dict[str, Step] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        if all(name in half.gradients for half in halves):
            groups.setdefault(leaders[name], []).append(name)
    with torch.no_grad(), progress("Finding the step", len(names), unit="weights", quiet=task.quiet) as tick:
        for leader, members in groups.items():
            wide = working_dtype(task.model.get_submodule(members[0]).weight.device)
            seen = float(_total(halves, "rows", leader))  # so that the product of both moments counts each call once
            inputs = Basis.of(_total(halves, "inputs", leader).to(wide) / seen, DAMPING)
            right: Tensor | None = None
            for name in members:
                layer = task.model.get_submodule(name)
                assert isinstance(layer, FactoredLinear)
                moment = _total(halves, "outputs", name).to(wide) / both
                first, second = (
                    half.gradients.pop(name).to(wide) / count for half, count in zip(halves, tokens, strict=True)
                )
                found = natural_step(
                    layer.to_dense(wide), (first, second), Basis.of(moment, DAMPING), inputs, layer.rank
                )
                kept = torch.promote_types(task.model.dtype, torch.float32)
                right = found.right.to(kept) if right is None else right
                steps[name] = Step(
                    found.weight.to(kept), found.direction.to(kept), found.left.to(kept), right, found.agreed
                )
                tick()
    return steps


def _total(halves: list[Sums], kind: Literal["inputs", "outputs", "rows"], name: str) -> Tensor:
    """One moment of both halves, taken out of them."""
    first, second = (getattr(half, kind).pop(name) for half in halves)
    total: Tensor = first + second
    return total


def _layer(step: Step, size: float, old: FactoredLinear, stored: torch.dtype) -> FactoredLinear | None:
    """The layer after a step; None if it would have no bounded gauge form, and so more numbers."""
    left, right = stepped(step, size, old.rank)
    form: Literal["plain", "auto"] = "plain" if old.form == "plain" else "auto"
    made = FactoredLinear.from_factors(left, right, old.bias, form, old.transposed, dtype=stored)
    if made.numbers > old.numbers:
        return None
    like = next(old.parameters())
    return made.to(like.device, like.dtype).requires_grad_(like.requires_grad)
