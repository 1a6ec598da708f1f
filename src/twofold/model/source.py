"""Where a model is (a folder, a hub id, a GGUF file or the built-in alias), and what it says of itself before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from twofold.checkpoint.configuration import check_depth, read_config
from twofold.checkpoint.headers import INDEX, read_index
from twofold.checkpoint.recognize import check_checkpoint
from twofold.checkpoint.shards import Shards
from twofold.errors import TwofoldError
from twofold.model import builtin
from twofold.model.blocks import has_two_stacks
from twofold.model.place import find_model
from twofold.model.stored import Stored


def locate(name: str, revision: str | None, trust_remote_code: bool) -> tuple[str | Path, dict[str, Any], Path | None]:
    """Find a model for transformers: its source, the arguments to load it with, and its folder if it is a local one.

    Raises:
        TwofoldError: if there is no such folder or file, or it is no checkpoint.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    path = builtin.smollm2_folder() if name == builtin.ALIAS else find_model(name, revision)
    if path is None:
        return name, where, None
    if path.is_file():
        return path.parent, {**where, "gguf_file": path.name}, None
    check_checkpoint(path, name)
    read_config(path)  # refuses a configuration or an index that can't be used, before transformers sees it
    if (path / INDEX).is_file():
        read_index(path / INDEX)
    return path, where, path


def config_and_class(source: str | Path, where: dict[str, Any]) -> tuple[Any, Any]:
    """Read the configuration, and find the class to load; where they disagree, read it again as that class does."""
    config = AutoConfig.from_pretrained(source, **where)
    model_class = model_class_of(config, where["trust_remote_code"])
    kind = getattr(model_class, "config_class", None)
    if kind is not None and not isinstance(config, kind):
        config = kind.from_pretrained(source, **where)
    return config, model_class


def model_class_of(config: Any, trust_remote_code: bool) -> Any:
    """Return the class that the checkpoint names, so that any kind of head loads; else the language model of its stacks."""
    names = getattr(config, "architectures", None) or []
    if names and not (trust_remote_code and getattr(config, "auto_map", None)):
        named = getattr(transformers, str(names[0]), None)
        if named is transformers.PreTrainedModel:  # what is asked of it, transformers would remember for all classes
            raise TwofoldError(
                "the model's config.json names PreTrainedModel, which is none; name the class of the model"
            )
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    return AutoModelForSeq2SeqLM if has_two_stacks(config) else AutoModelForCausalLM


def open_shards(folder: Path | None, name: str) -> Shards | None:
    """Open the weight files of a local folder, by their headers.

    Raises:
        TwofoldError: if they are not whole, or too few for the layers that config.json names.
    """
    if folder is None:
        return None
    shards = Shards.open(folder, name)
    count = len(shards.headers)
    check_depth(read_config(folder), folder / "config.json", count, f"the {count} tensors in its weight files")
    return shards


def stored_dtype(config: Any, stored: Stored) -> torch.dtype | None:
    """Return the dtype that the weights are stored in: of most of their numbers, or else as the configuration says.

    Where the two differ, a note in ``stored`` says so.

    Raises:
        TwofoldError: if the configuration names a type that is not of floating point.
    """
    said = getattr(config, "dtype", None)
    said = getattr(torch, said, None) if isinstance(said, str) else said
    if isinstance(said, torch.dtype) and not said.is_floating_point:
        raise TwofoldError(f"the model's config.json names {said} as its dtype, which is not a floating-point type")
    held = stored.dtype
    if held is not None and isinstance(said, torch.dtype) and held != said:
        words = [str(dtype).removeprefix("torch.") for dtype in (said, held)]
        stored.notes.append(
            f"config.json names {words[0]} as the dtype, the weights are stored in {words[1]}: the result is, too"
        )
    return held or (said if isinstance(said, torch.dtype) else None)


def choose_device(device: str) -> torch.device:
    """Return the device of a name; "auto" takes an accelerator if there is one.

    Raises:
        TwofoldError: if there is no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except Exception as error:
        raise TwofoldError(f"there is no device {device!r} here; use `device=cpu`") from error
    return torch.device(device)


def compute_dtype(dtype: str, stored: Any, device: torch.device) -> torch.dtype:
    """Return the dtype of the computation; "auto" is float32 on a processor, and the stored dtype elsewhere."""
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    return stored if device.type != "cpu" and isinstance(stored, torch.dtype) else torch.float32
