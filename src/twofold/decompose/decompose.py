"""Moments to spectra: every target decomposed once, for every rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from twofold.calibrate.moments import Moments
from twofold.decompose.spectra import Spectra
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.host.progress import Tick, progress
from twofold.linalg.metric import working_dtype
from twofold.linalg.spectrum import KnownRoots, Spectrum, decompose
from twofold.model.blocks import Chain, stretches
from twofold.model.streamed import Resident
from twofold.model.weights import Target, dense_weight
from twofold.objectives.base import LayerMoments, Objective, Problem

BATCH = 4  # weights of one shape that are decomposed together, as long as they are small


BATCH_NUMBERS = 4 * 1024**2  # k² of all together


def layer_problem(
    model: nn.Module, target: Target, moments: Moments | None, objective: Objective, damping: float
) -> Problem:
    """The metric and the Gram matrix of one target under an objective."""
    weight = dense_weight(model.get_submodule(target.name)).detach()
    weight = weight.to(working_dtype(weight.device))
    layer = moments.layer(target.name) if moments is not None else LayerMoments()
    assert objective.build is not None  # those without cut structures
    return objective.build(weight, layer, damping)


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
    moments: Moments | None,
    objective: Objective,
    damping: float,
    spectra: Spectra,
    *,
    chain: Chain | None = None,
    blocks: int = 1,
    quiet: bool = False,
) -> Spectra:
    """Decompose every target once, for every rank; what the spectra hold already is not done again.

    Many processes share the work, if the spectra have a folder.

    Raises:
        TwofoldError: naming the layer whose weight or moments are not finite.
    """
    residence.keep_apart()
    summed_low = moments is not None and residence.dtype != torch.float64
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
                    spectra.add(name, _decompose(residence.model, inside, moments, objective, damping, eps, tick))
    processes.wait()
    if processes.world() > 1:
        spectra.refresh()
    return spectra


def _decompose(
    model: nn.Module,
    targets: list[Target],
    moments: Moments | None,
    objective: Objective,
    damping: float,
    eps: float | None,
    tick: Tick,
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
            problems = [layer_problem(model, target, moments, objective, damping) for target in batch]
            for target, problem in zip(batch, problems, strict=True):
                if not torch.isfinite(problem.gram).all():
                    raise TwofoldError(f"the weight or the moments of {target.name} hold NaN or infinity")
            metrics = [p.metric for p in problems if p.metric is not None]
            grams = torch.stack([p.gram for p in problems])
            side = problems[0].side
            del problems
            stacked = decompose(torch.stack(metrics) if metrics else None, grams, side, eps, known)
            for i, target in enumerate(batch):
                one = stacked[i]
                found[target.name] = replace(one, basis=one.basis.to(torch.float32, copy=True))
                tick()
    return found
