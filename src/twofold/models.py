"""Models: a local folder, a hub id, a GGUF file, or the built-in alias; loaded by plain transformers, checked before use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from twofold import builtin
from twofold.blocks import Chain, watch_chain
from twofold.checkpoint import shards
from twofold.checkpoint.configuration import check_depth, read_config
from twofold.checkpoint.headers import INDEX, check_fit, read_index
from twofold.checkpoint.quantizer import METHOD, TwofoldConfig, TwofoldQuantizer
from twofold.checkpoint.shards import Shards
from twofold.errors import TwofoldError
from twofold.residence import Resident, Streamed
from twofold.targets import Target, find_groups

LAYER = re.compile(r"\.\d+\.")


@dataclass
class LoadedModel:
    """A model, its tokenizer (None if it has none), and where they came from."""

    model: Any
    tokenizer: Any
    name: str  # as the user gave it
    source: Path | None  # the folder, if it is a local one
    stored_dtype: torch.dtype  # of the checkpoint's weights
    no_tokenizer: str = ""  # why there is none
    residence: Resident = field(default=None)  # type: ignore[assignment]
    shards: Shards | None = None  # the files that the weights came from, if they are safetensors on this disk

    def __post_init__(self) -> None:
        if self.residence is None:
            self.residence = Resident(self.model)


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
    optimized: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer, and check its weights.

    Args:
        name: a folder, a hub id, a .gguf file, or ``smollm2``.
        dtype: of the computation; "auto" is float32 on a processor and the stored dtype elsewhere.
        optimized: whether a factored model is put into its inference form.

    Raises:
        TwofoldError: if there is no such model, it is not whole, or a weight is NaN or infinite.
    """
    chosen_device = choose_device(device)
    source, where, folder = _locate(name, revision, trust_remote_code)
    held = _shards(folder, name)
    try:
        config, model_class = _config_and_class(source, where)
        stored = _stored_dtype(config, folder)
        compute = compute_dtype(dtype, stored, chosen_device)
        if held is not None and _is_plain(config, trust_remote_code):
            check_fit(held.headers, _empty_model(config, model_class, trust_remote_code), name)
        with quiet_bars():
            model, report = model_class.from_pretrained(
                source,
                dtype=compute,
                use_safetensors=None if "gguf_file" in where else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **where,
            )
    except TwofoldError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, SafetensorError, KeyError …
        raise TwofoldError(f"the model {name} can't be loaded: {first_line(error)}") from error
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise TwofoldError(
            f"size mismatch: the weight {key} in the checkpoint {name} is {tuple(found)}, its config.json says "
            f"{tuple(expected)}; fetch it again"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise TwofoldError(
            f"the checkpoint {name} is not whole: {len(missing)} weights are missing, first {missing[0]}; fetch it again"
        )
    _check_layers(model, report["unexpected_keys"], name)
    if "gguf_file" in where:
        forget_gguf(model)
    model = model.to(chosen_device).eval()
    check_finite(model, name)
    if optimized:
        from twofold.inference import optimize  # it stands on the checkpoint, which stands beside this

        optimize(model, quiet=True)
    tokenizer, reason = _tokenizer(source, where)
    return LoadedModel(model, tokenizer, name, folder, stored or compute, reason, shards=held)


def _tokenizer(source: str | Path, where: dict[str, Any]) -> tuple[Any, str]:
    """The tokenizer of a model, or None and why there is none."""
    try:
        with quiet_bars():
            return AutoTokenizer.from_pretrained(source, **where), ""
    except Exception as error:  # a model of another modality has none; who needs it says so
        return None, first_line(error)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model that is not loaded.

    Raises:
        TwofoldError: if there is no such model, or it has none.
    """
    source, where, folder = _locate(name, None, trust_remote_code)
    tokenizer, reason = _tokenizer(source, where)
    return need_tokenizer(LoadedModel(None, tokenizer, name, folder, torch.float32, reason))


def load_streamed(
    name: str,
    chain: Chain,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A model whose weights stay on disk, to be read block by block; see ``residence``.

    Args:
        chain: its blocks, as ``survey`` finds them.

    Raises:
        TwofoldError: if there is no such model, or it is not whole.
    """
    chosen_device = choose_device(device)
    source, where, folder = _locate(name, revision, trust_remote_code)
    folder = folder or _download(name, revision)
    held = _shards(folder, name)
    assert held is not None
    try:
        config, model_class = _config_and_class(source, where)
        stored = _stored_dtype(config, folder)
        compute = compute_dtype(dtype, stored, chosen_device)
        check_fit(held.headers, _empty_model(config, model_class, trust_remote_code), name)
        model = empty_model(model_class, config, compute)
    except TwofoldError:
        raise
    except Exception as error:
        raise TwofoldError(f"the model {name} can't be read: {first_line(error)}") from error
    residence = Streamed(model, held, chain, compute, chosen_device)
    _check_layers(model, residence.unexpected, name)
    tokenizer, reason = _tokenizer(source, where)
    return LoadedModel(model, tokenizer, name, folder, stored or compute, reason, residence, held)


def empty_model(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model with parameters on the meta device, and with its buffers (rotary frequencies and the like) computed."""
    with quiet_bars(), init_empty_weights(include_buffers=False):
        model = model_from_config(model_class, config, dtype)
    model.tie_weights()
    _replace_factored(model, config)
    return model.eval().requires_grad_(False)


def _download(name: str, revision: str | None) -> Path:
    """The files of a hub model, on this disk."""
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise TwofoldError(f"the model {name} can't be fetched: {first_line(error)}") from error


def _replace_factored(model: Any, config: Any) -> None:
    """Give a skeleton the factored layers that its configuration names."""
    settings = getattr(config, "quantization_config", None)
    settings = settings if isinstance(settings, dict) else getattr(settings, "to_dict", dict)()
    if settings.get("quant_method") == METHOD:
        TwofoldQuantizer(TwofoldConfig(**settings)).replace_modules(model)


@dataclass(frozen=True)
class Survey:
    """What a run without weights tells of a model."""

    chain: Chain | None
    before: frozenset[str]  # modules that run before the first block
    groups: dict[str, str]  # target → the first target with the same input


def survey(loaded: LoadedModel, targets: list[Target], length: int = 8) -> Survey:
    """Run a model of the same configuration whose tensors have shapes but no numbers.

    Raises:
        TwofoldError: if it does not run on token ids alone.
    """
    try:
        with quiet_bars(), FakeTensorMode():
            # In bfloat16, the one dtype that every kernel of an expert layer takes.
            model = type(loaded.model)._from_config(loaded.model.config, dtype=torch.bfloat16).eval()
            ids = torch.zeros(1, length, dtype=torch.int64)
            groups = find_groups(model, targets, lambda: model(input_ids=ids))
            model.requires_grad_(False)
            mark = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))
            with watch_chain(model) as watch, torch.enable_grad():
                model(input_ids=ids)
            mark.remove()
    except Exception as error:  # an architecture that needs other inputs, or looks at its numbers, fails in its own way
        raise TwofoldError(
            f"{type(loaded.model).__name__} can't be run block by block ({first_line(error)}); "
            "give it the memory to be loaded whole, with --memory"
        ) from error
    return Survey(watch.chain(), watch.before(), groups)


def load_skeleton(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> LoadedModel:
    """A model without its weights, on the meta device: made from the configuration alone, however large it is.

    A GGUF file is loaded whole, since its configuration stands in the file.

    Raises:
        TwofoldError: if there is no such model.
    """
    if name.endswith(".gguf"):
        return load_model(name, trust_remote_code=trust_remote_code)
    source, where, folder = _locate(name, revision, trust_remote_code)
    try:
        config, model_class = _config_and_class(source, where)
        model = _empty_model(config, model_class, trust_remote_code)
        stored = _stored_dtype(config, folder) or torch.float32
        held = None
        if folder is not None and any(folder.glob("*.safetensors")):  # a configuration alone will do
            held = _shards(folder, name)
            if held is not None and _is_plain(config, trust_remote_code):
                check_fit(held.headers, model, name)
    except TwofoldError:
        raise
    except Exception as error:
        raise TwofoldError(f"the model {name} can't be read: {first_line(error)}") from error
    return LoadedModel(model.eval(), None, name, folder, stored, shards=held)


def _empty_model(config: Any, model_class: Any, trust_remote_code: bool) -> Any:
    """A model of this configuration on the meta device, with its factored layers if it has some."""
    with quiet_bars(), torch.device("meta"):
        model = model_from_config(model_class, config, None, trust_remote_code)
    model.tie_weights()
    _replace_factored(model, config)
    return model


def model_from_config(model_class: Any, config: Any, dtype: torch.dtype | None, trust_remote_code: bool = False) -> Any:
    """A model made from its configuration; an Auto class finds the architecture."""
    settings = {} if dtype is None else {"dtype": dtype}
    if hasattr(model_class, "_from_config"):
        return model_class._from_config(config, **settings)
    return model_class.from_config(config, trust_remote_code=trust_remote_code, **settings)


def _is_plain(config: Any, trust_remote_code: bool) -> bool:
    """Whether the weights are stored as the configuration alone says: not packed by a quantizer, no code of their own.

    Raises:
        TwofoldError: if transformers does not know how they are packed; it would go on with a warning.
    """
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if isinstance(settings, dict) and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise TwofoldError(
            f"the model's config.json names the quantization {method!r}, which transformers does not know"
        )
    return (settings is None or method == METHOD) and not (trust_remote_code and getattr(config, "auto_map", None))


def _shards(folder: Path | None, name: str) -> Shards | None:
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


def _locate(name: str, revision: str | None, trust_remote_code: bool) -> tuple[str | Path, dict[str, Any], Path | None]:
    """Where transformers finds a model: its source, the arguments to load it with, and its folder if it is a local one.

    Raises:
        TwofoldError: if there is no such folder or file, or it is no checkpoint.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    path = builtin.smollm2_folder() if name == builtin.ALIAS else _path(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise TwofoldError(f"{name} is a file but no .gguf; name the folder of a Transformers checkpoint")
        return path.parent, {**where, "gguf_file": path.name}, None
    if path.is_dir():
        _check_folder(path, name)
        return path, where, path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise TwofoldError(f"there is no folder {name}; name a folder, a hub id, a .gguf file, or {builtin.ALIAS}")
    return name, where, None


def _path(name: str) -> Path:
    """The place that a name stands for, if it is one.

    Raises:
        TwofoldError: if no file can have that name.
    """
    try:
        path = Path(name).expanduser()
        path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, an unknown ~user
        reason = getattr(error, "strerror", None) or error
        raise TwofoldError(f"the model {name[:80]!r} can't be found: {reason}") from error
    return path


def _stored_dtype(config: Any, folder: Path | None) -> torch.dtype | None:
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
        shards.check_finite(key, tensor, name)


def check_ids(ids: Tensor, loaded: LoadedModel) -> None:
    """Refuse token ids that the model has no embedding of.

    Raises:
        TwofoldError: if the tokenizer gives ids beyond the model's vocabulary.
    """
    try:
        table = loaded.model.get_input_embeddings()
    except NotImplementedError:  # a model of several inputs: it says itself what it does not run on
        return
    weight = getattr(table, "weight", None)
    count = getattr(table, "num_embeddings", None if weight is None else len(weight))
    if count is not None and ids.numel() and int(ids.max()) >= count:
        raise TwofoldError(
            f"the tokenizer of {loaded.name} gives the token id {int(ids.max())}, the model has only {count} "
            "embeddings; they do not belong together"
        )


def _check_layers(model: nn.Module, unexpected: Iterable[str], name: str) -> None:
    """Refuse to drop layers that the checkpoint has and config.json does not; other weights that are left over do no harm.

    Raises:
        TwofoldError: naming the first weight.
    """
    known = {LAYER.sub(".#.", key) for key in model.state_dict()}
    dropped = sorted(key for key in unexpected if LAYER.search(key) and LAYER.sub(".#.", key) in known)
    if dropped:
        raise TwofoldError(
            f"the checkpoint {name} has more layers than its config.json says, first {dropped[0]}; fetch it again"
        )


def compute_dtype(dtype: str, stored: Any, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored


def _check_folder(path: Path, name: str) -> None:
    """Refuse a folder whose configuration or shard index can't be used, before transformers sees it."""
    if not (path / "config.json").is_file():
        raise TwofoldError(f"{name} is no Transformers checkpoint: it has no config.json")
    read_config(path)
    if (path / INDEX).is_file():
        read_index(path / INDEX)


def _config_and_class(source: str | Path, where: dict[str, Any]) -> tuple[Any, Any]:
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


def first_line(error: Exception) -> str:
    """The first line of what an error says, with the second one if it announces that, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError):
        return f"it does not know {error}"
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
