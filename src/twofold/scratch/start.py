"""A model that is factorized before it is trained: no texts, no moments, the same share of every weight, plain factors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from twofold.checkpoint.plugin import attach
from twofold.errors import TwofoldError
from twofold.host.quiet import first_line, quiet_bars
from twofold.linalg.metric import working_dtype
from twofold.model.bare import check_bare
from twofold.model.kinds import dense_weight
from twofold.model.load import check_finite_weights
from twofold.model.skeleton import model_from_config
from twofold.model.source import model_class_of
from twofold.model.weights import find_targets
from twofold.nn.compact import CompactLinear
from twofold.nn.int_matrix import IntMatrix
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module
from twofold.planning.make import make_plan
from twofold.planning.plan import Plan
from twofold.recipe import make_recipe

DEFAULTS: dict[str, object] = {"keep": 0.5, "objective": "svd", "allocate": "uniform", "form": "plain"}
SETTINGS = ("keep", "include", "exclude", "overrides", "rank_multiple", "min_rank", "seed")
Factors = tuple[Tensor, Tensor]  # (m, r), (r, n)


def spectral(weight: Tensor, rank: int, generator: torch.Generator) -> Factors:  # of (m, n)
    """Return U √Σ and √Σ Vᵀ of the truncated SVD of a dense start, its nearest product (Khodak et al., arXiv 2105.01029)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def random(weight: Tensor, rank: int, generator: torch.Generator) -> Factors:  # of (m, n)
    """Return normal factors, each of variance (mean(W²) / r)^½: the mean square of their product is that of a dense start."""
    m, n = weight.shape
    deviation = float(weight.square().mean() / rank) ** 0.25
    left, right = (torch.randn(shape, generator=generator, dtype=weight.dtype) for shape in ((m, rank), (rank, n)))
    return (left * deviation).to(weight.device), (right * deviation).to(weight.device)


STARTS: dict[str, Callable[[Tensor, int, torch.Generator], Factors]] = {"spectral": spectral, "random": random}


def factorize_start(start: Any, init: str = "spectral", **settings: Any) -> Any:
    """Return a model of factored layers that is to be trained; from a configuration it is built with random weights first.

    Args:
        start: a configuration, or a model, which is changed in place.
        init: one of ``STARTS``.
        settings: those of ``SETTINGS``, as in a ``Recipe``.

    Raises:
        TwofoldError: for whatever the caller can put right.
    """
    if init not in STARTS:
        raise TwofoldError(f"init must be one of {', '.join(STARTS)}, got {init!r}")
    unknown = next((name for name in settings if name not in SETTINGS), None)
    if unknown is not None:
        raise TwofoldError(
            f"{unknown} does not go with init or a configuration: nothing is calibrated before a training from scratch; "
            f"the settings are {', '.join(SETTINGS)}"
        )
    given = {name: value for name, value in settings.items() if value is not None}
    recipe = make_recipe({**DEFAULTS, **given, "model": type(start).__name__})
    model, notes = _build(start, recipe.seed)
    check_finite_weights(model, recipe.model)
    stored = next(model.parameters()).dtype
    targets = find_targets(model, recipe.include, recipe.exclude)
    plan = make_plan(recipe.model, targets, None, recipe, stored.itemsize)
    plan.notes.extend(notes)
    if not any(entry.replaced for entry in plan.entries):
        raise TwofoldError(
            f"at keep={recipe.keep:g} every weight stays dense, and a dense model is trained as it is; take a smaller keep"
        )
    model.twofold_plan = _put_factors(model, plan, init, recipe.seed)
    attach(model)
    return model


def _build(start: Any, seed: int) -> tuple[Any, list[str]]:
    """Return the model itself, or the one of a configuration, with the weights of a seed; and notes on it."""
    if isinstance(start, nn.Module):
        notes = check_bare(start)
        _check_dense(start)
        return start, notes
    if not isinstance(start, PretrainedConfig):
        raise TwofoldError(
            "factorize with init takes a transformers configuration or a loaded model, got "
            f"{type(start).__name__}; read one with AutoConfig.from_pretrained or AutoModelForCausalLM.from_pretrained"
        )
    if getattr(start, "quantization_config", None) is not None:
        raise TwofoldError(
            "the configuration is of a factorized or quantized checkpoint, which is no start for a training from scratch; "
            "take that of the dense model"
        )
    with torch.random.fork_rng(), quiet_bars():
        torch.manual_seed(seed)
        try:
            return model_from_config(model_class_of(start, False), copy.deepcopy(start)), []
        except (ValueError, TypeError, RuntimeError) as error:
            raise TwofoldError(f"no model can be built from this configuration: {first_line(error)}") from error


def _check_dense(model: nn.Module) -> None:
    """Refuse a model that is factorized or quantized already, and one without weights."""
    integers, compact = (any(isinstance(m, kind) for m in model.modules()) for kind in (IntMatrix, CompactLinear))
    if integers or (getattr(model, "is_quantized", False) and not compact):
        raise TwofoldError(
            "the model is quantized, and integers are not factorized; start from the model it was made of"
        )
    if compact:
        raise TwofoldError("the model is factorized already; put its dense weights back first: model.dequantize()")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TwofoldError("the model has no weights yet (it is on the meta device); give its configuration instead")


@torch.no_grad()
def _put_factors(model: nn.Module, plan: Plan, init: str, seed: int) -> Plan:
    """Put factored layers in the place of dense ones; return the plan, whose reasons say how."""
    generator = torch.Generator().manual_seed(seed)
    entries = []
    for entry in plan.entries:
        if entry.rank is not None:
            module = model.get_submodule(entry.name)
            weight = dense_weight(module).detach()
            left, right = STARTS[init](weight.to(working_dtype(weight.device)), entry.rank, generator)
            layer = FactoredLinear.from_factors(
                left, right, getattr(module, "bias", None), "plain", entry.transposed, dtype=weight.dtype
            )
            replace_module(model, entry.name, layer)
            entry = entry.model_copy(update={"reason": f"{init} start, the same share of every weight"})
        entries.append(entry)
    return plan.model_copy(update={"entries": entries})
