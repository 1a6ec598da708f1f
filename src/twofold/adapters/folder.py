"""Adapters on disk, as PEFT writes and reads them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from twofold.checkpoint.peft.register import register
from twofold.checkpoint.recognize import check_names
from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line
from twofold.model.load import LoadedModel
from twofold.nn.layers.factored import balanced

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(
    folder: Path,
    layers: Mapping[str, tuple[Tensor, Tensor]],  # by layer: left (m, r), right (r, n); their product is added
    base: str,
    kind: str | None = "CAUSAL_LM",
) -> None:
    """Write a LoRA adapter whose layers have ranks of their own.

    Args:
        kind: PEFT's name of what the model is for.
    """
    ranks = {name: left.shape[1] for name, (left, _) in layers.items()}
    counts = list(ranks.values())
    usual = max(set(counts), key=counts.count)
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=pattern, alpha_pattern=dict(pattern), target_modules=sorted(ranks),
        task_type=kind, base_model_name_or_path=base, inference_mode=True,
    )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in layers.items():
        up, down = balanced(left, right)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.float().contiguous()
    config.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def task_type(model: Any) -> str | None:
    """Return PEFT's name of what a model is for; None for its plainest wrapper, which serves every other one."""
    return "CAUSAL_LM" if model.can_generate() else None


def load_adapter(model: Any, folder: Path, name: str, loaded: LoadedModel) -> PeftModel:
    """Put an adapter on a model, or on one that has others already.

    Raises:
        TwofoldError: if there is none, it is a pickle, or it does not belong to this model.
    """
    if not (folder / CONFIG).is_file():
        raise TwofoldError(f"there is no adapter in {folder}: it has no {CONFIG}")
    if not (folder / WEIGHTS).is_file():
        raise TwofoldError(
            f"the adapter {folder} has no {WEIGHTS}; Twofold loads no other format (pickles can run code)"
        )
    check_base(folder, loaded)
    register()
    with (
        errors_in_words(  # shapes, names, an unknown kind of adapter …
            lambda error: (
                f"the adapter {folder} does not fit {loaded.name}: {first_line(error)}; "
                "name the model that it was trained on"
            )
        ),
        warnings.catch_warnings(),  # advice to who calls PEFT by hand
    ):
        warnings.simplefilter("ignore")
        if not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        found = model.load_adapter(
            str(folder), adapter_name=name
        )  # for the first one again: it tells what was not taken
    missing = {key.replace(f".{name}", "") for key in found.missing_keys}  # as in the file, without the adapter's name
    check_names(set(found.unexpected_keys), missing, "")
    extra = [] if model.peft_config[name].is_prompt_learning else found.unexpected_keys
    for names, what in ((found.missing_keys, "lacks"), (extra, f"holds, and {loaded.name} has no place for,")):
        if names:
            raise TwofoldError(
                f"the adapter {folder} {what} {len(names)} weights, first {names[0]}; name the model that it was trained on"
            )
    return model


def check_base(folder: Path, loaded: LoadedModel) -> None:
    """Refuse an adapter, or a tuned model, whose record says that it was made from other weights.

    Raises:
        TwofoldError: if it was.
    """
    record: Any = None
    with suppress(OSError, ValueError):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    recorded = str(record.get("base_sha256", "")) if isinstance(record, dict) else ""
    if recorded and loaded.shards is not None and recorded != loaded.shards.hash(""):
        raise TwofoldError(
            f"{folder} was made from another model than {loaded.name}: the weights differ from those that its run.json names; "
            "name the model that it was trained on"
        )
