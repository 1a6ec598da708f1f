"""Structures measured at every size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from twofold.calibrate.moments import Moments
from twofold.decompose.spectra import Spectra
from twofold.host.progress import progress
from twofold.model.structure import Structure
from twofold.structures.cut import prepare


def measure_structures(
    model: nn.Module,
    structures: Sequence[Structure],
    moments: Moments,
    damping: float,
    spectra: Spectra,
    *,
    quiet: bool = False,
) -> Spectra:
    """What every size of every structure loses, as values whose tails are the losses.

    They stand with the last weight of each, one for each of its rows or columns.
    """
    with progress("Decomposing", len(structures), unit="structures", quiet=quiet) as tick:
        for structure in structures:
            losses = prepare(structure, model, moments, damping).losses.cpu().double().numpy()
            each = structure.members[-1].per_unit
            spectra.values[structure.name] = ((losses[:-1] - losses[1:]) / each).repeat(each)
            tick()
    return spectra
