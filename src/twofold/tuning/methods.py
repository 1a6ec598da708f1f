"""The methods by name: what of a model is trained, by PEFT's adapters or by ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from transformers import TrainerCallback

from twofold.checkpoint.peft.lora import whole_layers
from twofold.errors import TwofoldError
from twofold.model.weights import matches
from twofold.nn.compact import CompactLinear
from twofold.nn.int_matrix import IntMatrix
from twofold.nn.layers.shared import SharedLinear
from twofold.scratch.bound import BoundedUpdate
from twofold.tuning.directions import split_directions
from twofold.tuning.fused import fuse_lora
from twofold.tuning.settings import TuneSettings
from twofold.tuning.tokens import Example

DENSE = ("dora", "pissa", "olora", "corda", "vera", "adalora")  # these look into a dense weight
CONVERTED = ("pissa", "olora", "corda")  # these change the base weight, so the difference is what is saved
BESIDE = ("lora", "rslora", "eva")  # these leave the weight as it is, and look at its outputs alone
WHOLE_MODEL = ("full", "factors", "factors-top", "factors-tail")  # after these the model is written, and no adapter
SAMPLED = 64  # rows that eva and corda look at


class AdaLoraSteps(TrainerCallback):  # type: ignore[misc]
    """Tells AdaLoRA of each step while its gradients are there: it spreads the ranks over the layers as it trains."""

    def __init__(self, adapted: PeftModel) -> None:
        self.adapted = adapted

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.adapted.base_model.update_and_allocate(state.global_step + 1)


@dataclass
class Method:
    """A model that is ready to be trained."""

    model: Any  # a PeftModel, or the model itself
    adapter: bool  # whether an adapter is saved, and not the model
    initial: Path | None = None  # the adapter of before the training, where the difference is saved
    merged: bool = False  # whether the adapter is put into the model before it is saved
    callbacks: list[TrainerCallback] = field(default_factory=list)
    optimizer_hooks: list[BoundedUpdate] = field(default_factory=list)

    @property
    def trainable(self) -> int:
        """Count the numbers that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def trained_layers(model: nn.Module, settings: TuneSettings) -> list[str]:
    """Return the names of the layers that are trained.

    Raises:
        TwofoldError: if a pattern matches none, or none is left.
    """
    names = whole_layers(model)
    for pattern in [*settings.include, *settings.exclude]:
        if not any(matches(name, [pattern]) for name in names):
            raise TwofoldError(
                f"the pattern {pattern!r} matches no linear layer; list them with: twofold inspect {settings.model}"
            )
    included = settings.include or ["*"]
    names = [name for name in names if matches(name, included) and not matches(name, settings.exclude)]
    if not names:
        raise TwofoldError("no layer is left to train; see `include` and `exclude`")
    return names


def check_method(model: nn.Module, settings: TuneSettings) -> list[str]:
    """Return the names of the layers that are trained.

    Raises:
        TwofoldError: if the method can't train this model.
    """
    if settings.method not in BESIDE and any(isinstance(module, IntMatrix) for module in model.modules()):
        raise TwofoldError(
            f"{settings.model} is kept in integers (`bits`), and `method={settings.method}` can't train these; take "
            f"{', '.join(BESIDE[:-1])} or {BESIDE[-1]}, or train the checkpoint that was compressed without `bits`"
        )
    names = trained_layers(model, settings)
    compact = [name for name in names if isinstance(model.get_submodule(name), CompactLinear)]
    if settings.method.startswith("factors") and not compact:
        raise TwofoldError(
            f"`method={settings.method}` trains the layers of a factorized model, and {settings.model} has none; factorize it "
            "first (twofold compress), or take `method=lora`"
        )
    if settings.method in DENSE and compact:
        raise TwofoldError(
            f"`method={settings.method}` needs the dense weight, and {compact[0]} is kept in its factors; take lora, rslora, "
            "eva, factors, factors-top or factors-tail, or leave such layers out with `exclude`"
        )
    return compact if settings.method.startswith("factors") else names


def apply_method(model: Any, settings: TuneSettings, *, examples: list[Example], steps: int, folder: Path) -> Method:
    """Make a model ready to be trained; what is drawn at random is drawn from the seed.

    Args:
        examples: those that are trained on; eva and corda look at some.
        steps: of the optimizer; adalora spreads its ranks over them.
        folder: for the adapter of before the training, where it is needed.

    Raises:
        TwofoldError: if the method can't train this model.
    """
    names = check_method(model, settings)
    torch.manual_seed(settings.seed)
    if settings.method == "full":
        model.requires_grad_(True)
        return Method(model, adapter=False)
    if settings.method == "factors":
        free_factors(model, names)
        bound = BoundedUpdate({name: model.get_submodule(name) for name in names}, settings.bound)
        return Method(model, adapter=False, optimizer_hooks=[bound])
    if settings.method in ("factors-top", "factors-tail"):
        wrapped = split_directions(model, names, settings.size, leading=settings.method == "factors-top")
        return Method(wrapped, adapter=False, merged=True)
    config = adapter_config(settings, names, steps)
    batches = _batches(examples, next(model.parameters()).device)

    def run_batches() -> None:
        for batch in batches:
            model(**batch)

    if settings.method == "corda":
        preprocess_corda(model, config, run_model=run_batches)
    adapted: PeftModel = get_peft_model(model, config)
    if settings.method == "eva":
        initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    method = Method(adapted, adapter=True)
    if settings.method in CONVERTED:
        method.initial = folder / "initial"
        start, config.init_lora_weights = config.init_lora_weights, True  # PEFT asks for a plain name of the start
        adapted.save_pretrained(method.initial)
        config.init_lora_weights = start
    fuse_lora(adapted)
    if settings.method == "adalora":
        method.callbacks.append(AdaLoraSteps(adapted))
    return method


def adapter_config(settings: TuneSettings, names: list[str], steps: int) -> PeftConfig:
    """Return PEFT's configuration of an adapter."""
    rank, method = settings.size, settings.method
    common: dict[str, Any] = {"target_modules": names, "task_type": "CAUSAL_LM"}
    if method == "vera":
        return VeraConfig(r=rank, vera_dropout=settings.dropout, projection_prng_key=settings.seed, **common)
    common |= {"lora_alpha": settings.scale, "lora_dropout": settings.dropout}
    if method == "adalora":
        return AdaLoraConfig(
            target_r=rank, init_r=max(rank * 3 // 2, rank + 1), tinit=steps // 10, tfinal=steps // 3,
            total_step=steps, deltaT=max(1, steps // 50), **common,
        )  # fmt: skip
    extra: dict[str, dict[str, Any]] = {
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
        "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
    }
    return LoraConfig(r=rank, **common, **extra.get(method, {}))


def free_factors(model: Any, names: list[str]) -> None:
    """Train the factors of these layers, with the bases that they share, and nothing else."""
    model.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        for child in layer.CHILDREN:
            getattr(layer, child).weight.requires_grad_(True)
        if isinstance(layer, SharedLinear):
            layer.basis.reduce.weight.requires_grad_(True)


def _batches(examples: list[Example], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return the first rows as batches of one."""
    rows = [torch.tensor([example.input_ids], device=device) for example in examples[:SAMPLED]]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
