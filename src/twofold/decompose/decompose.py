"""Moments to spectra: every target decomposed once, for every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from twofold.calibrate.moments import Moments
from twofold.decompose.spectra import Spectra
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.host.progress import Tick, progress
from twofold.linalg.metric import working_dtype
from twofold.linalg.spectrum import KnownRoots, Spectrum
from twofold.linalg.spectrum import decompose as decompose_stack
from twofold.model.blocks import Chain, stretches
from twofold.model.kinds import dense_weight
from twofold.model.streamed import Resident
from twofold.model.structure import Structure
from twofold.model.target import Target, Targets
from twofold.objectives import LayerMoments, Objective, Problem
from twofold.structures.cut import prepare

BATCH = 4  # weights of one shape that are decomposed together, as long as they are small
BATCH_NUMBERS = 4 * 1024**2  # k² of all together


@dataclass
class Decomposition:
    """What was decomposed, and under which objective: all that factors are made of."""

    moments: Moments | None
    objective: Objective
    damping: float
    spectra: Spectra

    def layer(self, name: str) -> LayerMoments:
        """Return the moments of one target."""
        return self.moments.layer(name) if self.moments is not None else LayerMoments()

    def problem(self, model: nn.Module, target: Target) -> Problem:
        """Return the metric and the Gram matrix of one target under the objective."""
        weight = dense_weight(model.get_submodule(target.name)).detach()
        assert self.objective.build is not None  # those without cut structures
        return self.objective.build(weight.to(working_dtype(weight.device)), self.layer(target.name), self.damping)

    def spectrum(self, target: Target, problem: Problem) -> Spectrum:
        """Return the spectrum of one target, in the precision of its problem."""
        return self.spectra.get(target, problem.gram.dtype, problem.gram.device)


def decompose(
    residence: Resident,
    targets: Targets,
    made: Decomposition,
    *,
    chain: Chain | None = None,
    blocks: int = 1,
    quiet: bool = False,
) -> None:
    """Find what every rank of every target loses, or every size of those that are cut together; nothing if none is truncated."""
    if targets.structures:
        assert made.moments is not None
        measure_structures(residence.model, targets.structures, made, quiet=quiet)
    elif made.objective.correct is None:
        decompose_targets(residence, targets.targets, made, chain=chain, blocks=blocks, quiet=quiet)


def measure_structures(
    model: nn.Module, structures: Sequence[Structure], made: Decomposition, *, quiet: bool = False
) -> None:
    """Find what every size of every structure loses, as values whose tails are the losses.

    They stand with the last weight of each, one for each of its rows or columns.
    """
    assert made.moments is not None
    with progress("Decomposing", len(structures), unit="structures", quiet=quiet) as tick:
        for structure in structures:
            losses = prepare(structure, model, made.moments, made.damping).losses.cpu().double().numpy()
            each = structure.members[-1].per_unit
            made.spectra.values[structure.name] = ((losses[:-1] - losses[1:]) / each).repeat(each)
            tick()


def work_units(targets: list[Target], chain: Chain | None, blocks: int) -> list[tuple[str, list[str], list[Target]]]:
    """Which targets are worked on together: a name, the blocks that they stand in, and the targets.

    Args:
        blocks: how many blocks may be in memory at once.
    """
    if chain is None:
        return [("whole", [], list(targets))]
    outside = [target for target in targets if chain.block_of(target.name) is None]
    units: list[tuple[str, list[str], list[Target]]] = [("outside", [], outside)] if outside else []
    for part in stretches(chain, blocks):
        inside = [
            t for t in targets if part.first <= (i if (i := chain.block_of(t.name)) is not None else -1) < part.last
        ]
        if inside:
            units.append((f"{part.first:04d}-{part.last:04d}", list(chain.blocks[part.first : part.last]), inside))
    return units


def decompose_targets(
    residence: Resident,
    targets: list[Target],
    made: Decomposition,
    *,
    chain: Chain | None = None,
    blocks: int = 1,
    quiet: bool = False,
) -> None:
    """Decompose every target once, for every rank; what its spectra hold already is not done again.

    Many processes share the work, if the spectra have a folder.

    Raises:
        TwofoldError: naming the layer whose weight or moments are not finite.
    """
    residence.keep_apart()
    spectra = made.spectra
    summed_low = made.moments is not None and residence.dtype != torch.float64
    eps = torch.finfo(torch.float32).eps if summed_low else None
    units = work_units(targets, chain, blocks)
    mine = units[processes.rank() :: processes.world()] if spectra.folder is not None else units
    missing = [(name, held, spectra.lacks(inside)) for name, held, inside in mine]
    total = sum(len(inside) for _, _, inside in mine)
    done = total - sum(len(inside) for _, _, inside in missing)
    with progress("Decomposing", total, done=done, unit="weights", quiet=quiet) as tick:
        for name, held, inside in missing:
            if inside:
                with residence.hold(held):
                    spectra.add(name, _decompose(residence.model, inside, made, eps, tick))
    processes.wait()
    if processes.world() > 1:
        spectra.refresh()


def _decompose(
    model: nn.Module, targets: list[Target], made: Decomposition, eps: float | None, tick: Tick
) -> dict[str, Spectrum]:
    """Decompose weights that are in memory, those of one shape together."""
    found: dict[str, Spectrum] = {}
    shapes: dict[tuple[int, int], list[Target]] = {}
    for target in targets:
        shapes.setdefault((target.out_features, target.in_features), []).append(target)
    known = KnownRoots()
    for shape, same in shapes.items():
        together = max(1, min(BATCH, BATCH_NUMBERS // min(shape) ** 2))
        for begin in range(0, len(same), together):
            batch = same[begin : begin + together]
            problems = [made.problem(model, target) for target in batch]
            for target, problem in zip(batch, problems, strict=True):
                if not torch.isfinite(problem.gram).all():
                    raise TwofoldError(f"the weight or the moments of {target.name} hold NaN or infinity")
            metrics = [p.metric for p in problems if p.metric is not None]
            grams = torch.stack([p.gram for p in problems])
            side = problems[0].side
            del problems
            stacked = decompose_stack(torch.stack(metrics) if metrics else None, grams, side, eps, known)
            for i, target in enumerate(batch):
                one = stacked[i]
                found[target.name] = replace(one, basis=one.basis.to(torch.float32, copy=True))
                tick()
    return found
