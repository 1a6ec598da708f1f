"""The stages of a factorization, each from values to a value: spectra of moments, factored layers of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from twofold.decompose.decompose import Decomposition
from twofold.factor.integers import corrected_layer, integer_dense, integer_layer, round_rest
from twofold.factor.outcome import Outcome, carried_out, plain_update
from twofold.factor.structures import cut_entries
from twofold.host.progress import Tick, progress
from twofold.linalg.spectrum import Spectrum, truncate, truncation_loss
from twofold.model.kinds import dense_weight, kind_of
from twofold.model.structure import Structure
from twofold.model.target import Target
from twofold.nn.compact import CompactLinear
from twofold.nn.places import hold_bases, replace_module
from twofold.objectives import Problem
from twofold.planning.plan import Plan, PlanEntry
from twofold.quantize.loss import far_diagonal


def factor_layer(
    module: nn.Module,
    weight: torch.Tensor,  # (out, in)
    entry: PlanEntry,
    spectrum: Spectrum,
    problem: Problem,
    stored_dtype: torch.dtype,
    outputs: torch.Tensor | None = None,  # (out,)
) -> Outcome:
    """Return the factored layer of a plan's entry; its loss is measured.

    The numbers are rounded to the dtype that will be stored, and computed with in the dtype of the weight. If the problem is of
    centred inputs, the layer's bias takes up what the product changes of the mean output.

    Args:
        module: the dense layer.
        weight: that is factored, the layer's or another one.
        outputs: the mean output without a bias that is to be kept; that of the weight by default.
    """
    kind = kind_of(module)
    assert entry.rank is not None and kind is not None
    left, right = truncate(weight, spectrum, problem.metric, entry.rank)
    form = "plain" if entry.form == "plain" else "auto"
    layer = kind.layer(module, left, right, form, stored_dtype)
    update: dict[str, Any] = {"form": layer.form}
    if form == "auto" and layer.form == "plain":
        update = plain_update(entry, spectrum)
        left, right = truncate(weight, spectrum, problem.metric, update["rank"])
        layer = kind.layer(module, left, right, "plain", stored_dtype)
    layer = layer.to(weight.dtype)
    product = layer.to_dense(spectrum.values.dtype)
    if problem.mean is not None:
        mean = problem.mean.to(product)
        kept = weight.to(product) @ mean if outputs is None else outputs.to(product)
        _fold(layer, module, kept - product @ mean, stored_dtype)
    update["measured_loss"] = truncation_loss(weight, product, problem.metric, problem.gram)
    return carried_out(layer, entry, update)


@torch.no_grad()
def _fold(
    layer: CompactLinear,
    module: nn.Module,
    missing: torch.Tensor,  # (out,)
    stored_dtype: torch.dtype,
) -> None:
    """Put the dense layer's bias and what is missing of the mean output into a layer's bias."""
    assert layer.bias is not None and isinstance(module.bias, torch.Tensor)
    layer.bias.copy_((module.bias.to(missing) + missing).to(stored_dtype))


def factor_entries(
    model: nn.Module, entries: list[PlanEntry], decomposition: Decomposition, stored_dtype: torch.dtype, tick: Tick
) -> Iterator[Outcome]:
    """Factor or round those weights of a plan that do not stay dense, one after another; they are in memory."""
    for entry in entries:
        if entry.replaced:
            yield _factor_entry(model, entry, decomposition, stored_dtype)
        tick()


def _factor_entry(
    model: nn.Module, entry: PlanEntry, decomposition: Decomposition, stored_dtype: torch.dtype
) -> Outcome:
    """Factor or round one weight."""
    module = model.get_submodule(entry.name)
    if decomposition.objective.correct is not None:
        outcome = corrected_layer(module, entry, decomposition, stored_dtype)
    else:
        shape = entry.out_features, entry.in_features
        target = Target(entry.name, *shape, entry.bias, entry.transposed, centred=entry.centred)
        problem = decomposition.problem(model, target)
        spectrum = decomposition.spectrum(target, problem)
        weight = dense_weight(module).detach()
        if entry.bits is None:
            outcome = factor_layer(module, weight, entry, spectrum, problem, stored_dtype)
        else:
            moments = decomposition.layer(entry.name)
            wide = weight.to(problem.gram.dtype)
            far = far_diagonal(wide, moments, decomposition.objective, decomposition.damping)
            if entry.rank is None:
                outcome = integer_dense(module, entry, problem, far, stored_dtype)
            else:
                outcome = integer_layer(module, entry, spectrum, problem, far, stored_dtype)
    outcome.layer.requires_grad_(any(p.requires_grad for p in module.parameters()))
    return outcome


def apply_plan(
    model: nn.Module,
    plan: Plan,
    decomposition: Decomposition,
    stored_dtype: torch.dtype,
    *,
    structures: Sequence[Structure] = (),
    quiet: bool = False,
) -> tuple[Plan, dict[str, nn.Module]]:
    """Put the factored layers in the place of the dense ones of a model that is in memory.

    Args:
        structures: the weights that are cut together, if the plan is of such.

    Returns:
        The plan as it was carried out (forms, measured losses, notes), and the dense modules that were replaced.
    """
    entries: dict[str, PlanEntry] = {}
    notes = list(plan.notes)
    replaced: dict[str, nn.Module] = {}
    with progress("Factorizing", len(plan.entries), unit="weights", quiet=quiet) as tick:
        if structures:
            outcomes = cut_entries(model, plan.entries, structures, decomposition, stored_dtype, tick)
        else:
            outcomes = factor_entries(model, plan.entries, decomposition, stored_dtype, tick)
        for layer, entry, note in outcomes:
            entries[entry.name] = entry
            notes += [note] if note is not None else []
            replaced[entry.name] = replace_module(model, entry.name, layer)
    hold_bases(model)
    replaced |= round_rest(model, plan, stored_dtype)
    carried = [entries.get(entry.name, entry) for entry in plan.entries]
    return plan.model_copy(update={"entries": carried, "notes": notes}), replaced
