"""The optimizers by name, all of transformers' Trainer: AdamW, and those whose state is smaller."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from twofold.errors import TwofoldError
from twofold.tuning.settings import PROJECTED, TuneSettings

TRAINER = {"adamw": "adamw_torch", "adafactor": "adafactor", "galore": "galore_adamw", "apollo": "apollo_adamw"}
PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch"}
REFRESH = 200  # steps between two choices of the subspace, as both papers have it


def check_optimizer(settings: TuneSettings) -> None:
    """Make sure that the optimizer's package is there.

    Raises:
        TwofoldError: naming it if it is not.
    """
    package = PACKAGES.get(settings.optimizer)
    for name in (package, "bitsandbytes") if package else ():
        if importlib.util.find_spec(name) is None:
            raise TwofoldError(
                f"`optimizer={settings.optimizer}` needs the package {name.replace('_', '-')}, which is not installed; "
                "install it with: pip install 'twofold[low-rank-optimizers]'"
            )


def projected_layers(model: nn.Module, settings: TuneSettings) -> dict[str, nn.Linear]:
    """Find the linear layers, also factors of factored ones, whose gradients are projected: those larger than the rank."""
    if settings.optimizer not in PROJECTED:
        return {}
    table = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and id(module.weight) not in table
        and min(module.weight.shape) > settings.projected_rank
    }


def check_layers(model: nn.Module, settings: TuneSettings) -> None:
    """Make sure that a model, with its weights or without, has layers that the optimizer projects.

    Raises:
        TwofoldError: if it has none, or layers of GPT-2's kind.
    """
    if settings.optimizer not in PROJECTED:
        return
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise TwofoldError(
            f"`optimizer={settings.optimizer}` projects the gradients of nn.Linear, and this model's layers are GPT-2's Conv1D; "
            "take adamw or adafactor"
        )
    if not projected_layers(model, settings):
        raise TwofoldError(
            f"no layer is larger than the rank {settings.projected_rank} that `optimizer={settings.optimizer}` projects to; "
            "take a smaller `optimizer_rank`, or adamw"
        )


def optimizer_arguments(model: nn.Module, settings: TuneSettings) -> dict[str, Any]:
    """Return the arguments of the Trainer that choose it."""
    arguments: dict[str, Any] = {"optim": TRAINER[settings.optimizer]}
    if settings.optimizer in PROJECTED:
        # With the scale 1 the rate means what it means for AdamW.
        arguments["optim_args"] = f"rank={settings.projected_rank},update_proj_gap={REFRESH},scale=1.0"
        arguments["optim_target_modules"] = list(projected_layers(model, settings))
    return arguments


def state_numbers(model: nn.Module, settings: TuneSettings, trainable: int) -> int:
    """Count the numbers that the optimizer keeps, by the shapes of what is trained."""
    if settings.optimizer == "adafactor":  # a row and a column in the place of each matrix
        return sum(sum(p.shape) if p.dim() > 1 else p.numel() for p in model.parameters() if p.requires_grad)
    projected = [module.weight for module in projected_layers(model, settings).values()]
    whole = 2 * (trainable - sum(weight.numel() for weight in projected))
    rank = settings.projected_rank
    # Two moments of the projected gradient (rank, longer side), and the projection (rank, shorter side).
    return whole + sum(rank * (2 * max(weight.shape) + min(weight.shape)) for weight in projected)
