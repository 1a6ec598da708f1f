"""Models: a local folder, a hub id, a GGUF file, or the built-in alias; loaded by plain transformers, checked before use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from twofold import builtin
from twofold.checkpoint.quantizer import METHOD, TwofoldConfig, TwofoldQuantizer
from twofold.errors import TwofoldError


@dataclass
class LoadedModel:
    """A model, its tokenizer (None if it has none), and where they came from."""

    model: Any
    tokenizer: Any
    name: str  # as the user gave it
    source: Path | None  # the folder, if it is a local one
    stored_dtype: torch.dtype  # of the checkpoint's weights
    no_tokenizer: str = ""  # why there is none


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Keep transformers' own bars and notes out of our output."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def forget_gguf(model: Any) -> None:
    """Drop what the dequantized GGUF leaves in a model, so that it can be saved as an ordinary one."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


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
        raise TwofoldError(f"there is no device {device!r} here; use --device cpu") from error
    return chosen


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer, and check its weights.

    Args:
        name: a folder, a hub id, a .gguf file, or ``smollm2``.
        dtype: of the computation; "auto" is float32 on a processor and the stored dtype elsewhere.

    Raises:
        TwofoldError: if there is no such model, it is not whole, or a weight is NaN or infinite.
    """
    chosen_device = choose_device(device)
    source, where, folder = _locate(name, revision, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source, **where)
        stored = _stored_dtype(config, folder)
        compute = _compute_dtype(dtype, stored, chosen_device)
        model_class = _model_class(config, trust_remote_code)
        with quiet_bars():
            model, report = model_class.from_pretrained(
                source,
                dtype=compute,
                use_safetensors=None if "gguf_file" in where else True,
                output_loading_info=True,
                **where,
            )
    except TwofoldError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, SafetensorError, KeyError …
        raise TwofoldError(f"the model {name} can't be loaded: {first_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise TwofoldError(
            f"the checkpoint {name} is not whole: {len(missing)} weights are missing, first {missing[0]}; fetch it again"
        )
    if "gguf_file" in where:
        forget_gguf(model)
    model = model.to(chosen_device).eval()
    check_finite(model, name)
    tokenizer, reason = None, ""
    try:
        with quiet_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except Exception as error:  # a model of another modality has none; who needs it says so
        reason = first_line(error)
    return LoadedModel(model, tokenizer, name, folder, stored or compute, reason)


def load_skeleton(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> LoadedModel:
    """A model without its weights, on the meta device: made from the configuration alone, however large it is.

    A GGUF file is loaded whole, since its configuration stands in the file.

    Raises:
        TwofoldError: if there is no such model.
    """
    if name.endswith(".gguf"):
        return load_model(name, trust_remote_code=trust_remote_code)
    source, where, folder = _locate(name, revision, trust_remote_code, weights=False)
    try:
        config = AutoConfig.from_pretrained(source, **where)
        model_class = _model_class(config, trust_remote_code)
        with quiet_bars(), torch.device("meta"):
            if hasattr(model_class, "_from_config"):
                model = model_class._from_config(config)
            else:
                model = model_class.from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
        settings = getattr(config, "quantization_config", None)
        if isinstance(settings, dict) and settings.get("quant_method") == METHOD:
            TwofoldQuantizer(TwofoldConfig(**settings)).replace_modules(model)
    except TwofoldError:
        raise
    except Exception as error:
        raise TwofoldError(f"the model {name} can't be read: {first_line(error)}") from error
    return LoadedModel(model.eval(), None, name, folder, _stored_dtype(config, folder) or torch.float32)


def _locate(
    name: str, revision: str | None, trust_remote_code: bool, *, weights: bool = True
) -> tuple[str | Path, dict[str, Any], Path | None]:
    """Where transformers finds a model: its source, the arguments to load it with, and its folder if it is a local one.

    Raises:
        TwofoldError: if there is no such folder or file, or it is no checkpoint.
    """
    path = builtin.smollm2_folder() if name == builtin.ALIAS else Path(name).expanduser()
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if path.is_file():
        if path.suffix != ".gguf":
            raise TwofoldError(f"{name} is a file but no .gguf; name the folder of a Transformers checkpoint")
        return path.parent, {**where, "gguf_file": path.name}, None
    if path.is_dir():
        _check_folder(path, name, weights)
        return path, where, path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise TwofoldError(f"there is no folder {name}; name a folder, a hub id, a .gguf file, or {builtin.ALIAS}")
    return name, where, None


def _stored_dtype(config: Any, folder: Path | None) -> torch.dtype | None:
    """The dtype that the weights are stored in, by the configuration, or else by the header of the first weight file."""
    stored = getattr(config, "dtype", None)
    stored = getattr(torch, stored, None) if isinstance(stored, str) else stored
    if isinstance(stored, torch.dtype):
        return stored
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if not files:
        return None
    with safe_open(files[0], "pt") as file:
        kinds = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    most = max(set(kinds), key=kinds.count) if kinds else ""
    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(most)


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast what a checkpoint stores, in place: parameters and persistent buffers of floating point.

    Other buffers, such as rotary frequencies, stay in the precision that their architecture computes them in.
    """
    stored = model.state_dict().keys()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def positions(model: Any) -> int | None:
    """The longest window that a model can read, None if its configuration sets no limit."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    # RoBERTa's positions begin after the padding index.
    table = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    return longest - padding - 1 if isinstance(padding, int) else longest


def need_tokenizer(loaded: LoadedModel) -> Any:
    """The tokenizer.

    Raises:
        TwofoldError: if the model has none.
    """
    if loaded.tokenizer is None:
        raise TwofoldError(
            f"the model {loaded.name} has no tokenizer{f' ({loaded.no_tokenizer})' if loaded.no_tokenizer else ''}; "
            "put its files beside the weights, or pass tokenizer= with a model"
        )
    return loaded.tokenizer


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        TwofoldError: naming the first such weight.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TwofoldError(
                f"the weight {key} of {name} holds NaN or infinity; the checkpoint is broken, fetch it again"
            )


def _compute_dtype(dtype: str, stored: Any, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored


def _check_folder(path: Path, name: str, weights: bool) -> None:
    if not (path / "config.json").is_file():
        raise TwofoldError(f"{name} is no Transformers checkpoint: it has no config.json")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise TwofoldError(f"the index {index} can't be read; fetch the checkpoint again") from error
        outside = sorted(str(shard) for shard in shards if Path(str(shard)).name != shard)
        if outside:
            raise TwofoldError(
                f"the index {index} names a file outside of its folder, {outside[0]}; do not use this checkpoint"
            )
        absent = sorted(shard for shard in shards if not (path / shard).is_file())
        if absent and weights:
            raise TwofoldError(
                f"the checkpoint {name} lacks {len(absent)} of {len(shards)} shards, first {absent[0]}; fetch it again"
            )
    elif weights and not list(path.glob("*.safetensors")):
        raise TwofoldError(
            f"{name} has no weights in safetensors; Twofold loads no other format (pickles can run code)"
        )


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that the checkpoint names, so that any kind of head loads; else the causal language model."""
    names = getattr(config, "architectures", None) or []
    if names and not (trust_remote_code and getattr(config, "auto_map", None)):
        found = getattr(transformers, str(names[0]), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return AutoModelForCausalLM


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
