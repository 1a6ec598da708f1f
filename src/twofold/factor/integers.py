"""The layers of integers that a plan asks for: factors, whole weights with or without a correction, and embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.decompose.decompose import Decomposition
from twofold.factor.outcome import Outcome, carried_out, plain_update
from twofold.linalg.metric import damp, working_dtype
from twofold.linalg.spectrum import Spectrum
from twofold.model.kinds import dense_weight
from twofold.nn.int_matrix import IntLinear, IntMatrix
from twofold.nn.layers.corrected import CorrectedLinear
from twofold.nn.layers.embedding import QuantizedEmbedding
from twofold.nn.layers.quantized import QuantizedLinear
from twofold.nn.layers.tied import TiedLinear
from twofold.nn.places import replace_module
from twofold.objectives import Problem
from twofold.planning.plan import Plan, PlanEntry
from twofold.quantize.factors import factor_bytes, integer_factors
from twofold.quantize.loss import error_loss, factors_loss
from twofold.quantize.rounding import round_matrix


def bias_of(module: nn.Module) -> Tensor | None:  # (m,)
    return getattr(module, "bias", None)


def integer_layer(
    module: nn.Module,
    entry: PlanEntry,
    spectrum: Spectrum,
    problem: Problem,
    far: Tensor | None,  # (p,), the diagonal of the metric over the larger side
    stored: torch.dtype,
) -> Outcome:
    """Return the factors of a plan's entry in integers; without ``far`` their loss is not measured."""
    assert entry.rank is not None and entry.bits is not None
    weight = dense_weight(module).detach()
    rank, form, bits, group = entry.rank, entry.form, entry.bits, entry.scale_group
    update: dict[str, Any] = {}
    factors = integer_factors(weight, spectrum, problem.metric, rank, form, bits, group)  # type: ignore[arg-type]
    if factors is None:
        update = plain_update(entry, spectrum)
        factors = integer_factors(weight, spectrum, problem.metric, update["rank"], "plain", bits, group)
        assert factors is not None
        m, n = weight.shape
        update["quantized_bytes"] = factor_bytes("plain", m, n, update["rank"], bits, group)
    if far is not None:
        update["measured_loss"] = factors_loss(factors, problem.metric, problem.side, problem.gram, far)
    return carried_out(factors.layer(bias_of(module), entry.transposed, stored).to(weight.dtype), entry, update)


def integer_dense(
    module: nn.Module, entry: PlanEntry, problem: Problem, far: Tensor | None, stored: torch.dtype
) -> Outcome:
    """Return the whole weight of a plan's entry in integers; without ``far`` its loss is not measured."""
    assert entry.bits is not None
    weight = dense_weight(module).detach()
    inner = round_matrix(weight, entry.bits, entry.scale_group, IntLinear)
    layer = QuantizedLinear.around(inner, bias_of(module), entry.transposed, stored).to(weight.dtype)
    update = {}
    if far is not None:
        error = weight.to(problem.gram.dtype) - inner.weight.to(problem.gram.dtype)
        update["measured_loss"] = error_loss(error, problem.metric, problem.side, far)
    return Outcome(layer, entry.model_copy(update=update), None)


def corrected_layer(module: nn.Module, entry: PlanEntry, decomposition: Decomposition, stored: torch.dtype) -> Outcome:
    """Return a whole weight in integers with a correction of low rank, by the methods of objectives/_correction.py.

    The loss is tr(E′ C E′ᵀ) of the error E′ that is left, where C is known.
    """
    correct, moments, damping = decomposition.objective.correct, decomposition.layer(entry.name), decomposition.damping
    assert correct is not None and entry.rank is not None and entry.bits is not None
    weight = dense_weight(module).detach()
    # In float64, on the processor where the device has none.
    wide = weight.to(weight.device if working_dtype(weight.device) == torch.float64 else "cpu").double()
    inner = round_matrix(wide, entry.bits, entry.scale_group, IntLinear)
    left, right = correct(wide - inner.weight.to(wide), moments, damping, entry.rank)
    layer = CorrectedLinear.correct(inner, left, right, bias_of(module), entry.transposed, stored)
    update = {}
    if moments.input is not None:
        rest = wide - layer.to_dense(torch.float64)
        update["measured_loss"] = float(((rest @ damp(moments.input.to(wide), damping)) * rest).sum())
    return Outcome(layer.to(weight.device, weight.dtype), entry.model_copy(update=update), None)


def round_rest(model: nn.Module, plan: Plan, stored: torch.dtype) -> dict[str, nn.Module]:
    """Round what is no target and yet is to be of integers: embeddings with the output layers that share their table, and linear
    layers.

    Returns:
        The modules that were replaced, by their names.
    """
    replaced: dict[str, nn.Module] = {}
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for entry in plan.dense:
        if entry.bits is None:
            continue
        name = entry.name.removesuffix(".weight")
        module: Any = model.get_submodule(name)
        weight, dtype = module.weight, module.weight.dtype
        if isinstance(module, nn.Embedding):
            count, width = weight.shape
            table = QuantizedEmbedding(
                count, width, entry.bits, entry.scale_group, module.padding_idx, device=weight.device, dtype=stored
            )
            table.table = round_matrix(weight, entry.bits, entry.scale_group, IntMatrix)
            replaced[name] = replace_module(model, name, table.to(dtype))
            for other, layer in linear.items():
                if layer.weight is weight:
                    tied = TiedLinear(table, device=weight.device, dtype=dtype)
                    replaced[other] = replace_module(model, other, tied)
        else:
            turned = isinstance(module, Conv1D)
            inner = round_matrix(weight.T if turned else weight, entry.bits, entry.scale_group, IntLinear)
            rounded = QuantizedLinear.around(inner, module.bias, turned, stored).to(dtype)
            replaced[name] = replace_module(model, name, rounded)
    return replaced


def rest_names(plan: Plan, model: nn.Module) -> list[str]:
    """Return the names of the modules that ``round_rest`` replaces."""
    weights = {id(model.get_parameter(entry.name)) for entry in plan.dense if entry.bits is not None}
    return [name for name, module in model.named_modules() if id(getattr(module, "weight", None)) in weights]
