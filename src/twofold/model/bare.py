"""Models from a caller: the plain model that its class and configuration describe, with nothing around it and nothing on it.

What stands around a model or on it (an adapter, a compiled graph, hooks, masks) would be left out of what is measured, or of what
is written, without a word.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from twofold.checkpoint.plugin import METHOD
from twofold.errors import TwofoldError
from twofold.host.faults import models_errors
from twofold.host.quiet import first_line
from twofold.model.kinds import kind_of
from twofold.model.skeleton import model_on_meta
from twofold.model.weights import parameter_names

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def check_bare(model: Any) -> list[str]:
    """Refuse a model that something stands around or on, or whose weights are not those of its class and configuration.

    Returns:
        What else of it is not that of its class, which what is written will not have.

    Raises:
        TwofoldError: if it is no model; or naming what is around it or on it, and how it is taken off; or the first weight.
    """
    check_unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        parts = model.named_children() if isinstance(model, nn.Module) else ()
        inside = next(
            (f"; pass the model inside it, model.{n}" for n, m in parts if isinstance(m, PreTrainedModel)), ""
        )
        raise TwofoldError(f"factorize takes a transformers model or its name, got {type(model).__name__}{inside}")
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
    return _check_described(model)


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
    patterns = [key for module in model.modules() for key in getattr(module, "_tied_weights_keys", None) or ()]
    for names in parameter_names(model).values():
        undeclared = [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
        if len(undeclared) > 1:
            raise TwofoldError(
                f"{undeclared[0]} and {undeclared[1]} of the model are one weight, and {type(model).__name__} does not "
                "declare that, so it can't be saved; give each place a layer of its own (copy.deepcopy)"
            )


def _check_described(model: Any) -> list[str]:
    """Refuse weights that a model's class does not make from its configuration; return what else of it differs."""
    kind = type(model).__name__
    try:
        with models_errors(first_line):  # a class may take more than a configuration, and its code may do anything
            described = model_on_meta(type(model), copy.deepcopy(model.config), False)
    except TwofoldError as error:
        why = f"no {kind} can be made of its configuration alone ({error})"
        return [f"the model was not compared with its configuration: {why}"]
    here, there = ({name: _shape(value) for name, value in m.state_dict().items()} for m in (model, described))
    further = [name for name, _ in model.named_parameters() if name not in there and _runs(described, name)]
    name = next((name for name in [*there, *further] if here.get(name) != there.get(name)), None)
    if name is None:
        return _otherwise(model, described)
    if name not in here:
        owner = dict(model.named_modules()).get(name.rpartition(".")[0])
        stands = "" if owner is None else f" (a {torch.typename(owner)} stands there)"
        differs = f"the model has no {name}{stands}, which a {kind} of its configuration has"
    elif name not in there:
        differs = f"the model has {name}, which a {kind} of its configuration has not"
    else:
        differs = f"{name} of the model is {here[name]}, and a {kind} of its configuration has {there[name]}"
    raise TwofoldError(
        f"{differs}, so what is written could not be read as it is; set model.config to what the model is, or load it again"
    )


def _runs(described: nn.Module, name: str) -> bool:
    """Say whether a further weight takes part: one of a module of the class, or in a list of them, all of which are run."""
    owner, _, _ = name.rpartition(".")
    modules = dict(described.named_modules())
    if owner in modules:
        return True
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    return isinstance(modules[owner], nn.ModuleList | nn.Sequential)


def _shape(value: Any) -> str:
    """Return the shape of a tensor in words, or what stands in its place."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return " × ".join(map(str, value.shape)) or "one number"


def _otherwise(model: nn.Module, described: nn.Module) -> list[str]:
    """Say in a note what modules compute by that is not of their class and configuration: other code, other numbers."""
    differs: list[str] = []
    of_class = dict(described.named_modules())
    for name, module in model.named_modules():
        place, made = f"the layer {name} of the model" if name else "the model", of_class.get(name)
        if type(module) is not type(made):
            usual = "nothing" if made is None else type(made).__name__
            differs.append(f"{place} is {type(module).__name__}, where its class and configuration have {usual}")
        elif "forward" in vars(module):
            differs.append(f"{place} has a forward that is not that of its class")
        elif not isinstance(module, nn.modules.dropout._DropoutNd):  # off while a model is measured
            differs += [
                f"{place} has {key} = {value}, where its class and configuration have {vars(made)[key]}"
                for key, value in vars(module).items()
                if key != "vocab_size"  # which transformers leaves as it was when it resizes a table
                and type(value) in (int, float)
                and vars(made).get(key, value) != value
            ]
    if not differs:
        return []
    more = f"; so it is in {len(differs) - 1} further places" if len(differs) > 1 else ""
    return [f"{differs[0]}{more}: what is written is read with what the class and the configuration have"]
