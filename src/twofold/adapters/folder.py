"""Adapters on disk, as PEFT writes and reads them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from twofold.checkpoint.peft.register import register
from twofold.checkpoint.recognize import check_names
from twofold.checkpoint.shards import check_finite_tensor
from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line
from twofold.model.load import LoadedModel
from twofold.nn.layers.factored import balanced

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Starts of LoRA that change the model's weights by what no folder holds: a random draw, or data that was looked at.
UNREPEATABLE = ("pissa_niter_", "corda", "lora_ga")
MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\).* torch\.Size\(\[(.*?)\]\)"
)


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
        TwofoldError: if there is none, it is a pickle or broken, it does not belong to this model, or it changes the model when
            it is loaded in another way than when it was trained.
    """
    if not (folder / CONFIG).is_file():
        raise TwofoldError(f"there is no adapter in {folder}: it has no {CONFIG}")
    start = str(_read_config(folder).get("init_lora_weights", ""))
    if start.startswith(UNREPEATABLE):
        raise TwofoldError(
            f"the adapter {folder} began with init_lora_weights={start!r}, which changed the weights of the model by what no "
            "file holds, so what it was trained on can't be made again; save it as plain LoRA where it was trained: "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    if not (folder / WEIGHTS).is_file():
        raise TwofoldError(
            f"the adapter {folder} has no {WEIGHTS}; Twofold loads no other format (pickles can run code)"
        )
    check_base(folder, loaded)
    with errors_in_words(
        lambda error: f"the adapter {folder} can't be read: {first_line(error)}; fetch or save it again"
    ):
        for key, tensor in load_file(folder / WEIGHTS).items():
            check_finite_tensor(key, tensor, f"the adapter {folder}")
    register()
    with (
        errors_in_words(lambda error: _no_fit(error, folder, loaded)),  # shapes, names, an unknown kind of adapter …
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
    for names, what in (
        (_missing(model, found.missing_keys), "lacks"),
        (extra, f"holds, and {loaded.name} has no place for,"),
    ):
        if names:
            raise TwofoldError(
                f"the adapter {folder} {what} {len(names)} weights, first {names[0]}; name the model that it was trained on"
            )
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the settings of an adapter.

    Raises:
        TwofoldError: if they are none, or do not say what kind of adapter it is.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise TwofoldError(f"{folder / CONFIG} can't be read ({reason}); fetch or save the adapter again") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise TwofoldError(f"{folder / CONFIG} names no kind of adapter (peft_type); fetch or save the adapter again")
    return config


def _missing(model: PeftModel, names: list[str]) -> list[str]:
    """Return those of some weights that are read under no other name either: layers may share one."""
    missing, of_name = set(names), dict(model.named_parameters(remove_duplicate=False))
    read = {id(weight) for name, weight in of_name.items() if name not in missing}
    return [name for name in names if id(of_name.get(name)) not in read]


def _no_fit(error: Exception, folder: Path, loaded: LoadedModel) -> str:
    """Say why an adapter does not go on a model, and what to do."""
    does_not = f"the adapter {folder} does not fit {loaded.name}"
    found = MISMATCH.search(str(error))
    if found is None:
        return f"{does_not}: {first_line(error)}; name the model that it was trained on"
    name, of_adapter, of_model = found[1], *([int(size) for size in found[i].split(", ") if size] for i in (2, 3))
    tokens = getattr(loaded.model.config.get_text_config(), "vocab_size", None)
    differ = [pair for pair in zip(of_adapter, of_model, strict=False) if pair[0] != pair[1]]
    if len(differ) == 1 and differ[0][1] == tokens:
        return (
            f"{does_not}: it was trained with {differ[0][0]} tokens, and the model has {tokens}; give the model as many, "
            f"model.resize_token_embeddings({differ[0][0]}), save it with the adapter's tokenizer, and name that"
        )
    shapes = (" × ".join(map(str, shape)) for shape in (of_adapter, of_model))
    return f"{does_not}: {name} is {' in the adapter and '.join(shapes)} in the model; name the model that it was trained on"


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
