"""Where a model is, a folder, a hub id, a GGUF file or the built-in alias, and what it says of itself before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from twofold.checkpoint.configuration import check_depth, read_config
from twofold.checkpoint.headers import INDEX, read_index
from twofold.checkpoint.shards import Shards
from twofold.errors import TwofoldError
from twofold.model import builtin
from twofold.model.place import find_model


def locate(name: str, revision: str | None, trust_remote_code: bool) -> tuple[str | Path, dict[str, Any], Path | None]:
    """Where transformers finds a model: its source, the arguments to load it with, and its folder if it is a local one.

    Raises:
        TwofoldError: if there is no such folder or file, or it is no checkpoint.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    path = find_model(name, revision) if name != builtin.ALIAS else builtin.smollm2_folder()
    if path is None:
        return name, where, None
    if path.is_file():
        return path.parent, {**where, "gguf_file": path.name}, None
    _check_folder(path, name)
    return path, where, path


def _check_folder(path: Path, name: str) -> None:
    """Refuse a folder whose configuration or shard index can't be used, before transformers sees it."""
    if not (path / "config.json").is_file():
        raise TwofoldError(f"{name} is no Transformers checkpoint: it has no config.json")
    read_config(path)
    if (path / INDEX).is_file():
        read_index(path / INDEX)


def config_and_class(source: str | Path, where: dict[str, Any]) -> tuple[Any, Any]:
    """The configuration, and the class to load; where the two disagree, the configuration as that class reads it."""
    config = AutoConfig.from_pretrained(source, **where)
    model_class = model_class_of(config, where["trust_remote_code"])
    kind = getattr(model_class, "config_class", None)
    if kind is not None and not isinstance(config, kind):
        config = kind.from_pretrained(source, **where)
    return config, model_class


def model_class_of(config: Any, trust_remote_code: bool) -> Any:
    """The class that the checkpoint names, so that any kind of head loads; else the causal language model."""
    names = getattr(config, "architectures", None) or []
    if names and not (trust_remote_code and getattr(config, "auto_map", None)):
        found = getattr(transformers, str(names[0]), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return AutoModelForCausalLM


def open_shards(folder: Path | None, name: str) -> Shards | None:
    """The weight files of a local folder, by their headers.

    Raises:
        TwofoldError: if they are not whole, or too few for the layers that config.json names.
    """
    if folder is None:
        return None
    held = Shards.open(folder, name)
    count = len(held.headers)
    check_depth(read_config(folder), folder / "config.json", count, f"the {count} tensors in its weight files")
    return held


def stored_dtype(config: Any, folder: Path | None) -> torch.dtype | None:
    """The dtype that the weights are stored in, by the configuration, or else by the header of the first weight file."""
    stored = getattr(config, "dtype", None)
    stored = getattr(torch, stored, None) if isinstance(stored, str) else stored
    if isinstance(stored, torch.dtype):
        if not stored.is_floating_point:
            raise TwofoldError(f"the model's config.json names {stored} as its dtype, which is no floating-point type")
        return stored
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if not files:
        return None
    with safe_open(files[0], "pt") as file:
        kinds = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    most = max(set(kinds), key=kinds.count) if kinds else ""
    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(most)


def choose_device(device: str) -> torch.device:
    """The device of a name; "auto" takes an accelerator if there is one.

    Raises:
        TwofoldError: if there is no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except Exception as error:
        raise TwofoldError(f"there is no device {device!r} here; use `device=cpu`") from error
    return chosen


def compute_dtype(dtype: str, stored: Any, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored
