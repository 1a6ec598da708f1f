"""The stages of a factorization, each from values to a value: spectra of moments, factored layers of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from twofold.calibrate import Moments
from twofold.errors import TwofoldError
from twofold.linalg import Spectrum, decompose, truncate, truncation_loss
from twofold.nn import FactoredLinear
from twofold.objectives import LayerMoments, Objective, Problem
from twofold.plan import Plan, PlanEntry, rank_cost
from twofold.progress import progress
from twofold.targets import Target, dense_weight, replace_module

BATCH = 4  # weights of one shape that are decomposed together


@dataclass
class Spectra:
    """The decompositions of all targets; ``values`` are what the plan and the report need of them."""

    by_name: dict[str, Spectrum]

    @property
    def values(self) -> dict[str, NDArray[np.float64]]:
        """σ² of each target, largest first, (k,)."""
        return {name: spectrum.values.cpu().double().numpy() for name, spectrum in self.by_name.items()}


def working_dtype(device: torch.device) -> torch.dtype:
    """Float64 where the device has it: a Gram matrix squares the condition number."""
    return torch.float32 if device.type == "mps" else torch.float64


def layer_problem(
    model: nn.Module, target: Target, moments: Moments | None, objective: Objective, damping: float
) -> Problem:
    """The metric and the Gram matrix of one target under an objective."""
    weight = dense_weight(model.get_submodule(target.name)).detach()
    weight = weight.to(working_dtype(weight.device))
    layer = moments.layer(target.name) if moments is not None else LayerMoments()
    return objective.build(weight, layer, damping)


def decompose_targets(
    model: nn.Module,
    targets: list[Target],
    moments: Moments | None,
    objective: Objective,
    damping: float,
    *,
    quiet: bool = False,
) -> Spectra:
    """Decompose every target once, for every rank.

    Raises:
        TwofoldError: naming the layer whose weight or moments are not finite.
    """
    by_name: dict[str, Spectrum] = {}
    shapes: dict[tuple[int, int], list[Target]] = {}
    for target in targets:
        shapes.setdefault((target.out_features, target.in_features), []).append(target)
    summed = {tensor.dtype for tensor in moments.sums.values()} if moments is not None else set()
    eps = torch.finfo(torch.float32).eps if torch.float32 in summed else None
    with progress("Decomposing", len(targets), unit="weights", quiet=quiet) as tick:
        for same in shapes.values():
            for begin in range(0, len(same), BATCH):
                batch = same[begin : begin + BATCH]
                problems = [layer_problem(model, target, moments, objective, damping) for target in batch]
                for target, problem in zip(batch, problems, strict=True):
                    if not torch.isfinite(problem.gram).all():
                        raise TwofoldError(f"the weight or the moments of {target.name} hold NaN or infinity")
                metrics = [p.metric for p in problems if p.metric is not None]
                grams = torch.stack([p.gram for p in problems])
                stacked = decompose(torch.stack(metrics) if metrics else None, grams, problems[0].side, eps)
                for i, target in enumerate(batch):
                    by_name[target.name] = stacked[i]
                    tick()
    return Spectra({target.name: by_name[target.name] for target in targets})


def factor_layer(
    module: nn.Module,
    entry: PlanEntry,
    spectrum: Spectrum,
    stored_dtype: torch.dtype,
) -> tuple[FactoredLinear, str | None]:
    """The factored layer of one plan entry, and a note if the gauge form had to give way to plain factors.

    The numbers are rounded to the dtype that will be stored, and computed with in the dtype of the module.
    """
    assert entry.rank is not None
    weight = dense_weight(module).detach()
    left, right = truncate(weight, spectrum, entry.rank)
    bias = getattr(module, "bias", None)
    form: Literal["auto", "plain"] = "plain" if entry.form == "plain" else "auto"
    layer = FactoredLinear.from_factors(left, right, bias, form, entry.transposed, dtype=stored_dtype)
    note = None
    if form == "auto" and layer.form == "plain":
        # The same storage in plain factors takes a smaller rank.
        rank = max(entry.numbers_after // (entry.out_features + entry.in_features), 1)
        left, right = truncate(weight, spectrum, rank)
        layer = FactoredLinear.from_factors(left, right, bias, "plain", entry.transposed, dtype=stored_dtype)
        note = (
            f"{entry.name}: no bounded gauge form, so plain factors of rank {rank} take the place of rank {entry.rank}"
        )
    return layer.to(weight.dtype), note


def apply_plan(
    model: nn.Module,
    plan: Plan,
    spectra: Spectra,
    moments: Moments | None,
    objective: Objective,
    damping: float,
    stored_dtype: torch.dtype,
    *,
    quiet: bool = False,
) -> tuple[Plan, dict[str, nn.Module]]:
    """Put the factored layers in the place of the dense ones.

    Returns:
        The plan as it was carried out (forms, measured losses, notes), and the dense modules that were replaced.
    """
    entries: list[PlanEntry] = []
    notes = list(plan.notes)
    replaced: dict[str, nn.Module] = {}
    with progress("Factorizing", len(plan.entries), unit="weights", quiet=quiet) as tick:
        for entry in plan.entries:
            tick()
            if entry.rank is None:
                entries.append(entry)
                continue
            module = model.get_submodule(entry.name)
            spectrum = spectra.by_name[entry.name]
            layer, note = factor_layer(module, entry, spectrum, stored_dtype)
            target = Target(entry.name, entry.out_features, entry.in_features, entry.bias, entry.transposed)
            problem = layer_problem(model, target, moments, objective, damping)
            product = layer.to_dense(spectrum.values.dtype)
            measured = truncation_loss(dense_weight(module).detach(), product, problem.metric, problem.gram)
            update: dict[str, Any] = {"form": layer.form, "measured_loss": measured}
            if note is not None:
                notes.append(note)
                update |= {
                    "rank": layer.rank,
                    "numbers_after": rank_cost(layer.form, target, layer.rank),
                    "predicted_loss": float(spectrum.tails[layer.rank]),
                    "reason": f"{entry.reason}; plain factors, since the gauge form had no bounded coefficients",
                }
            layer.requires_grad_(any(p.requires_grad for p in module.parameters()))
            replaced[entry.name] = replace_module(model, entry.name, layer)
            entries.append(entry.model_copy(update=update))
    return plan.model_copy(update={"entries": entries, "notes": notes}), replaced


@contextmanager
def dense_again(model: nn.Module, replaced: dict[str, nn.Module]) -> Iterator[None]:
    """Within the block the model has its dense layers back, with no copy made."""
    factored = {name: replace_module(model, name, module) for name, module in replaced.items()}
    try:
        yield
    finally:
        for name, module in factored.items():
            replace_module(model, name, module)
