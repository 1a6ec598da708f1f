"""Moments to spectra: every target decomposed once, for every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from twofold.calibrate.moments import Moments
from twofold.decompose.spectra import Spectra
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.host.progress import Tick, progress
from twofold.linalg.metric import working_dtype
from twofold.linalg.spectrum import KnownRoots, Spectrum, spectrum_of
from twofold.model.blocks import Chain, stretches
from twofold.model.kinds import dense_weight
from twofold.model.streamed import Resident
from twofold.model.structure import Structure
from twofold.model.target import Target, Targets
from twofold.objectives import LayerMoments, Objective, Problem
from twofold.structures.cut import prepare_cut

BATCH = 4  # weights of one shape that are decomposed together, as long as they are small
BATCH_NUMBERS = 4 * 1024**2  # k² of all together


@dataclass
class Decomposition:
    """What was decomposed, and under which objective: all that factors are made of."""

    moments: Moments | None
    objective: Objective
    damping: float
    spectra: Spectra

    def layer(self, name: str, *, centred: bool = False) -> LayerMoments:
        """Return the moments of one target, or those of its centred inputs."""
        return self.moments.layer(name, centred=centred) if self.moments is not None else LayerMoments()

    def mean(self, target: Target) -> Tensor | None:  # (n,)
        """Return the mean of the inputs of a target; None if they are not centred."""
        return self.layer(target.name).input_mean if target.centred else None

    def problem(self, model: nn.Module, target: Target) -> Problem:
        """Return the metric and the Gram matrix of one target under the objective."""
        weight = dense_weight(model.get_submodule(target.name)).detach()
        assert self.objective.build is not None  # those without cut structures
        layer = self.layer(target.name, centred=target.centred)
        problem = self.objective.build(weight.to(working_dtype(weight.device)), layer, self.damping)
        return replace(problem, mean=layer.input_mean) if target.centred else problem

    def spectrum(self, target: Target, problem: Problem) -> Spectrum:
        """Return the spectrum of one target, in the precision of its problem."""
        return self.spectra.get(target, problem.gram.dtype, problem.gram.device)


def decompose_targets(
    residence: Resident,
    targets: Targets,
    decomposition: Decomposition,
    *,
    chain: Chain | None = None,
    blocks: int = 1,
    quiet: bool = False,
) -> None:
    """Find what every rank of every target loses, or every size of those that are cut together.

    Spectra that are there already are not computed again. Many processes share the work if the spectra have a folder. An
    objective that corrects rounded weights needs no spectra.

    Args:
        blocks: how many blocks may be in memory at once.

    Raises:
        TwofoldError: naming the layer whose weight or moments are not finite.
    """
    if targets.structures:
        _measure_structures(residence.model, targets.structures, decomposition, quiet=quiet)
        return
    if decomposition.objective.correct is not None:
        return
    residence.keep_apart()
    spectra = decomposition.spectra
    summed_low = decomposition.moments is not None and residence.dtype != torch.float64
    eps = torch.finfo(torch.float32).eps if summed_low else None
    units = _work_units(targets.targets, chain, blocks)
    if spectra.folder is not None:
        units = units[processes.rank() :: processes.world()]
    missing = [(name, names, spectra.lacks(inside)) for name, names, inside in units]
    total, left = (sum(len(inside) for _, _, inside in some) for some in (units, missing))
    with progress("Decomposing", total, done=total - left, unit="weights", quiet=quiet) as tick:
        for name, names, inside in missing:
            if inside:
                with residence.hold(names):
                    spectra.add(name, _decompose(residence.model, inside, decomposition, eps, tick))
    processes.wait()
    if processes.world() > 1:
        spectra.refresh()


def _measure_structures(
    model: nn.Module, structures: Sequence[Structure], decomposition: Decomposition, *, quiet: bool
) -> None:
    """Find what every size of every structure loses, as values whose tails are the losses.

    They stand with the last weight of each, one for each of its rows or columns.
    """
    assert decomposition.moments is not None
    with progress("Decomposing", len(structures), unit="structures", quiet=quiet) as tick:
        for structure in structures:
            cut = prepare_cut(structure, model, decomposition.moments, decomposition.damping)
            losses, each = cut.losses.cpu().double().numpy(), structure.members[-1].per_unit
            decomposition.spectra.values[structure.name] = ((losses[:-1] - losses[1:]) / each).repeat(each)
            tick()


def _work_units(targets: list[Target], chain: Chain | None, blocks: int) -> list[tuple[str, list[str], list[Target]]]:
    """Return what is worked on together: a name, the blocks that must be in memory, and the targets."""
    if chain is None:
        return [("whole", [], targets)]
    places = {target.name: chain.block_of(target.name) for target in targets}
    units: list[tuple[str, list[str], list[Target]]] = [("outside", [], [t for t in targets if places[t.name] is None])]
    for part in stretches(chain, blocks):
        inside = [t for t in targets if places[t.name] in range(part.first, part.last)]
        units.append((f"{part.first:04d}-{part.last:04d}", list(chain.blocks[part.first : part.last]), inside))
    return [unit for unit in units if unit[2]]


def _decompose(
    model: nn.Module, targets: list[Target], decomposition: Decomposition, eps: float | None, tick: Tick
) -> dict[str, Spectrum]:
    """Decompose weights that are in memory, those of one shape together."""
    spectra: dict[str, Spectrum] = {}
    shapes: dict[tuple[int, int], list[Target]] = {}
    for target in targets:
        shapes.setdefault((target.out_features, target.in_features), []).append(target)
    known = KnownRoots()
    for shape, alike in shapes.items():
        together = max(1, min(BATCH, BATCH_NUMBERS // min(shape) ** 2))
        for begin in range(0, len(alike), together):
            batch = alike[begin : begin + together]
            problems = [decomposition.problem(model, target) for target in batch]
            for target, problem in zip(batch, problems, strict=True):
                if not torch.isfinite(problem.gram).all():
                    raise TwofoldError(f"the weight or the moments of {target.name} hold NaN or infinity")
            metrics = [p.metric for p in problems if p.metric is not None]
            grams, side = torch.stack([p.gram for p in problems]), problems[0].side
            del problems
            stacked = spectrum_of(torch.stack(metrics) if metrics else None, grams, side, eps, known)
            for i, target in enumerate(batch):
                spectra[target.name] = replace(stacked[i], basis=stacked[i].basis.to(torch.float32, copy=True))
                tick()
    return spectra
