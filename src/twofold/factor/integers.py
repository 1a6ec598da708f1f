"""The layers of integers that a plan asks for: factors, dense weights, and embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from twofold.factor.plain import plain_update
from twofold.linalg.spectrum import Spectrum
from twofold.nn.int_matrix import IntLinear, IntMatrix
from twofold.nn.layers.embedding import QuantizedEmbedding
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.quantized import QuantizedLinear
from twofold.nn.layers.tied import TiedLinear
from twofold.nn.places import replace_module
from twofold.objectives import Problem
from twofold.planning.plan import Plan, PlanEntry
from twofold.quantize.factors import factor_bytes, integer_factors
from twofold.quantize.loss import error_loss, factors_loss
from twofold.quantize.rounding import round_matrix


def integer_layer(
    weight: Tensor,  # (m, n)
    bias: Tensor | None,  # (m,)
    entry: PlanEntry,
    spectrum: Spectrum,
    problem: Problem,
    far: Tensor | None,  # (p,), the diagonal of the metric over the larger side
    stored: torch.dtype,
) -> tuple[FactoredLinear, PlanEntry, str | None]:
    """The factors of a plan's entry in integers, the entry as it was carried out, and a note if the gauge form had to give way.

    Without ``far`` the loss is not measured.
    """
    assert entry.rank is not None and entry.bits is not None
    form: Any = entry.form
    note = None
    update: dict[str, Any] = {}
    factors = integer_factors(weight, spectrum, problem.metric, entry.rank, form, entry.bits, entry.scale_group)
    if factors is None:
        update, note = plain_update(entry, spectrum)
        rank, (m, n) = update["rank"], weight.shape
        update["quantized_bytes"] = factor_bytes("plain", m, n, rank, entry.bits, entry.scale_group)
        factors = integer_factors(weight, spectrum, problem.metric, rank, "plain", entry.bits, entry.scale_group)
        assert factors is not None
    measured = None if far is None else factors_loss(factors, problem.metric, problem.side, problem.gram, far)
    layer = factors.layer(bias, entry.transposed, stored).to(weight.dtype)
    return layer, entry.model_copy(update={"measured_loss": measured, **update}), note


def integer_dense(
    weight: Tensor,  # (m, n)
    bias: Tensor | None,  # (m,)
    entry: PlanEntry,
    problem: Problem | None,
    far: Tensor | None,
    stored: torch.dtype,
) -> tuple[QuantizedLinear, PlanEntry]:
    """The whole weight of a plan's entry in integers, and the entry with the loss if it can be measured."""
    assert entry.bits is not None
    inner = round_matrix(weight, entry.bits, entry.scale_group, IntLinear)
    layer = QuantizedLinear.around(inner, bias, entry.transposed, stored).to(weight.dtype)
    measured = None
    if problem is not None and far is not None:
        error = weight.to(problem.gram.dtype) - inner.weight.to(problem.gram.dtype)
        measured = error_loss(error, problem.metric, problem.side, far)
    return layer, entry.model_copy(update={"measured_loss": measured})


def round_rest(model: nn.Module, plan: Plan, stored: torch.dtype) -> dict[str, nn.Module]:
    """Round what is no target and yet is to be of integers: embeddings, with the output layers that share their table, and linear
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
        module = model.get_submodule(name)
        weight: Any = module.weight
        dtype = weight.dtype
        if isinstance(module, nn.Embedding):
            count, width = weight.shape
            table = QuantizedEmbedding(
                count, width, entry.bits, entry.scale_group, module.padding_idx, weight.device, stored
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
            bias: Any = module.bias
            made = QuantizedLinear.around(inner, bias, turned, stored).to(dtype)
            replaced[name] = replace_module(model, name, made)
    return replaced


def rest_names(plan: Plan, model: nn.Module) -> list[str]:
    """The modules that ``round_rest`` replaces."""
    names = [entry.name for entry in plan.dense if entry.bits is not None]
    weights = {id(model.get_parameter(name)) for name in names}
    return [n for n, m in model.named_modules() if id(getattr(m, "weight", None)) in weights]
