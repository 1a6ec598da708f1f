"""Models from a caller: the plain model that its class and configuration describe, with nothing around it and nothing on it.

What stands around a model or on it (an adapter, a compiled graph, hooks, masks) would be left out of what is measured, or of what
is written, without a word.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from twofold.checkpoint.plugin import METHOD
from twofold.errors import TwofoldError
from twofold.model.kinds import kind_of
from twofold.model.weights import parameter_names

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def check_bare(model: Any) -> None:
    """Refuse a model that something stands around or on.

    Raises:
        TwofoldError: if it is no model; or naming what is around it or on it, and how it is taken off.
    """
    check_unwrapped(model)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TwofoldError(f"factorize takes a transformers model or its name, got {type(model).__name__}")
    _refuse_first(model, _upon)
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(method, "quant_method", METHOD)
    if method != METHOD:
        raise TwofoldError(
            f"the model is quantized by {getattr(method, 'value', method)}; load it without, or make it dense first: "
            "model.dequantize()"
        )
    _check_tensors(model)
    _check_places(model)


def check_unwrapped(model: Any) -> None:
    """Refuse a model that is wrapped, compiled, or carries an adapter; hooks and the like may stand on it.

    Raises:
        TwofoldError: naming what it is, and how it is taken off.
    """
    if type(model).__name__ in PARALLEL:
        raise TwofoldError(f"the model is wrapped in {type(model).__name__}; pass the model inside it, model.module")
    if isinstance(model, nn.Module):
        _refuse_first(model, _around)


def _refuse_first(model: nn.Module, reasons: Callable[[nn.Module], Iterator[str]]) -> None:
    """Refuse the first module that there is a reason against."""
    for name, module in model.named_modules():
        reason = next(reasons(module), None)
        if reason is not None:
            raise TwofoldError(f"{f'the layer {name} of the model' if name else 'the model'} {reason}")


def _around(module: nn.Module) -> Iterator[str]:
    """Yield what a module is wrapped in, with what to do."""
    if "_orig_mod" in module._modules:
        yield "is compiled by torch.compile; pass the model inside, model._orig_mod, and compile what comes back"
    if getattr(module, "_compiled_call_impl", None) is not None:
        yield "is compiled in place by torch.compile, where nothing can be watched; load it again, and compile it afterwards"
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # where PEFT is not loaded, there is no adapter
    if tuners is not None:
        peft = sys.modules["peft"]
        auxiliary = sys.modules["peft.utils.other"].AuxiliaryTrainingWrapper
        if isinstance(
            module, (peft.PeftModel, peft.PeftMixedModel, tuners.BaseTuner, tuners.BaseTunerLayer, auxiliary)
        ):
            yield (
                "carries an adapter of PEFT; put it into the weights first, model = model.merge_and_unload(), or take it off, "
                "model = model.unload()"
            )


def _upon(module: nn.Module) -> Iterator[str]:
    """Yield what stands on a module, with what to do."""
    if hasattr(module, "_hf_hook"):
        yield (
            "has a hook of accelerate, which moves weights between devices or disk; load the model without `device_map`, or "
            "name its folder, and what does not fit in memory is worked through block by block"
        )
    kept = kind_of(module) is not None or isinstance(module, nn.Embedding)
    for hook in (hook for hooks in HOOKS for hook in getattr(module, hooks).values()):
        hook = getattr(hook, "func", hook)  # of a partial
        source = getattr(hook, "__module__", None) or type(hook).__module__
        if source == "torch.nn.utils.prune":
            yield "is pruned by a mask; make it final first: torch.nn.utils.prune.remove(layer, 'weight')"
        if source.startswith("torch.nn.utils.") and not kept:
            continue  # a convolution whose class gives it a norm of its weights
        if not source.startswith("transformers."):
            said = getattr(hook, "__qualname__", type(hook).__name__)
            yield f"has a hook, {said}, which may change what it computes; remove it first, and add it to the result again"
    if kept and parametrize.is_parametrized(module):
        yield (
            "has a parametrization, which its class does not know when it is loaded; make it final first: "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    if kept and "forward" in vars(module):
        yield "has a forward that is not that of its class, and a factored layer would not have it; take it off first"


def _check_tensors(model: nn.Module) -> None:
    """Refuse weights that are not plain numbers in memory."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TwofoldError(
                f"the weight {name} of the model has no numbers in memory (it is on the meta device); load the model without "
                "`device_map`, or name its folder"
            )
        kind = type(parameter.data)
        if kind is not torch.Tensor:
            raise TwofoldError(
                f"the weight {name} of the model is a {kind.__name__}, not a plain tensor; load the model without quantization "
                "or sharding"
            )
        if parameter.dtype not in DTYPES:
            raise TwofoldError(
                f"the weight {name} of the model is of the type {str(parameter.dtype).removeprefix('torch.')}; load the model in "
                "float32, bfloat16 or float16"
            )


def _check_places(model: Any) -> None:
    """Refuse a weight in several places that the model's class does not declare to be one: it could not be saved."""
    declared = getattr(model, "_tied_weights_keys", False)
    if declared is False:  # no model of transformers
        return
    patterns = [key for module in model.modules() for key in getattr(module, "_tied_weights_keys", None) or ()]
    for names in parameter_names(model).values():
        undeclared = [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
        if len(undeclared) > 1:
            raise TwofoldError(
                f"{undeclared[0]} and {undeclared[1]} of the model are one weight, and {type(model).__name__} does not "
                "declare that, so it can't be saved; give each place a layer of its own (copy.deepcopy)"
            )
