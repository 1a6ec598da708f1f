"""The stages of a factorization, each from values to a value: spectra of moments, factored layers of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from twofold.decompose.decompose import Decomposition
from twofold.factor.corrected import corrected_layer
from twofold.factor.integers import integer_dense, integer_layer, round_rest
from twofold.factor.plain import plain_update
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
) -> tuple[CompactLinear, PlanEntry, str | None]:
    """Return the factored layer of a plan's entry, the entry as it was carried out, and a note if the gauge form gave way.

    The numbers are rounded to the dtype that will be stored, and computed with in the dtype of the weight.

    Args:
        module: the dense layer.
        weight: that is factored, the layer's or another one.
    """
    kind = kind_of(module)
    assert entry.rank is not None and kind is not None
    left, right = truncate(weight, spectrum, problem.metric, entry.rank)
    form = "plain" if entry.form == "plain" else "auto"
    layer = kind.layer(module, left, right, form, stored_dtype)
    update: dict[str, Any] = {"form": layer.form}
    note = None
    if form == "auto" and layer.form == "plain":
        update, note = plain_update(entry, spectrum)
        left, right = truncate(weight, spectrum, problem.metric, update["rank"])
        layer = kind.layer(module, left, right, "plain", stored_dtype)
    layer = layer.to(weight.dtype)
    product = layer.to_dense(spectrum.values.dtype)
    measured = truncation_loss(weight, product, problem.metric, problem.gram)
    return layer, entry.model_copy(update={"measured_loss": measured, **update}), note


def target_of(entry: PlanEntry) -> Target:
    """The target that an entry of a plan is about."""
    return Target(entry.name, entry.out_features, entry.in_features, entry.bias, entry.transposed)


def factor_entries(
    model: nn.Module, entries: list[PlanEntry], made: Decomposition, stored_dtype: torch.dtype, tick: Tick
) -> Iterator[tuple[PlanEntry, CompactLinear | None, str | None]]:
    """Factor weights that are in memory, or round them, one after another."""
    for entry in entries:
        if entry.replaced:
            yield _factor_entry(model, entry, made, stored_dtype)
        else:
            yield entry, None, None
        tick()


def _factor_entry(
    model: nn.Module, entry: PlanEntry, made: Decomposition, stored_dtype: torch.dtype
) -> tuple[PlanEntry, CompactLinear, str | None]:
    """Factor or round one weight; give its entry as it was carried out, the layer, and a note."""
    module = model.get_submodule(entry.name)
    bias = getattr(module, "bias", None)
    layer: CompactLinear
    note = None
    if made.objective.correct is not None:
        correct, moments = made.objective.correct, made.layer(entry.name)
        layer, done = corrected_layer(dense_weight(module), bias, entry, correct, moments, made.damping, stored_dtype)
    else:
        target = target_of(entry)
        problem = made.problem(model, target)
        spectrum = made.spectrum(target, problem)
        weight = dense_weight(module).detach()
        if entry.bits is None:
            layer, done, note = factor_layer(module, weight, entry, spectrum, problem, stored_dtype)
        else:
            sides = made.layer(entry.name)
            far = far_diagonal(weight.to(problem.gram.dtype), sides, made.objective, made.damping)
            if entry.rank is None:
                layer, done = integer_dense(weight, bias, entry, problem, far, stored_dtype)
            else:
                layer, done, note = integer_layer(weight, bias, entry, spectrum, problem, far, stored_dtype)
    layer.requires_grad_(any(p.requires_grad for p in module.parameters()))
    return done, layer, note


def apply_plan(
    model: nn.Module,
    plan: Plan,
    made: Decomposition,
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
    done: dict[str, PlanEntry] = {}
    notes = list(plan.notes)
    replaced: dict[str, nn.Module] = {}
    with progress("Factorizing", len(plan.entries), unit="weights", quiet=quiet) as tick:
        layers: Iterable[tuple[PlanEntry, CompactLinear | None, str | None]]
        if structures:
            assert made.moments is not None
            layers = cut_entries(model, plan.entries, structures, made.moments, made.damping, stored_dtype, tick)
        else:
            layers = factor_entries(model, plan.entries, made, stored_dtype, tick)
        for entry, layer, note in layers:
            done[entry.name] = entry
            notes += [note] if note is not None else []
            if layer is not None:
                replaced[entry.name] = replace_module(model, entry.name, layer)
    hold_bases(model)
    replaced |= round_rest(model, plan, stored_dtype)
    entries = [done[entry.name] for entry in plan.entries]
    return plan.model_copy(update={"entries": entries, "notes": notes}), replaced
