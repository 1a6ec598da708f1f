"""Models: a local folder, a hub id, a GGUF file, or the built-in alias; loaded by plain transformers, checked before use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn

from twofold.checkpoint.beside import PATTERNS
from twofold.checkpoint.loaded import check_missing, check_shape
from twofold.checkpoint.shards import Shards, check_finite_tensor
from twofold.checkpoint.ties import part_weight
from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line, quiet_bars
from twofold.model.blocks import Chain
from twofold.model.generation import stored_generation
from twofold.model.quantized import (
    dequantized_dtype,
    load_dequantized,
    quantization_of,
    quantized_by,
    refuse_quantized,
    unpack,
    without_quantization,
)
from twofold.model.settings import Loading
from twofold.model.skeleton import empty_model, forget_gguf, is_plain, model_on_meta
from twofold.model.source import choose_device, compute_dtype, config_and_class, locate, open_shards, stored_dtype
from twofold.model.stored import Stored, check_depth_of_files, check_fit, find_stored
from twofold.model.streamed import Resident, Streamed
from twofold.model.target import Targets, UnusedTensor
from twofold.model.ties import part_by_files
from twofold.model.tokenizer import OWN_CODE, needs_trust, read_tokenizer
from twofold.model.weights import find_targets


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
    stored: Stored = field(default_factory=Stored)  # what they hold, by the names of the model
    own_dtypes: dict[str, torch.dtype] = field(
        default_factory=dict
    )  # of weights, by name, that are not stored as most are
    dequantized: str = ""  # how the checkpoint's weights are quantized, if they are ordinary ones in this model alone
    fetch: Callable[[], Path] | None = None  # of a model on the hub: fetches the files beside its weights to a folder
    hashed: str = ""  # the hash of its weights, where it is known
    trusted: bool = False  # whether code that comes with it may run
    processors: dict[str, Any] = field(default_factory=dict)  # of images and of clips, once they were asked for

    def __post_init__(self) -> None:
        if self.residence is None:
            self.residence = Resident(self.model)
        self.own_dtypes = self.own_dtypes or self.stored.own_dtypes

    @property
    def notes(self) -> list[str]:
        """What a reader of the result should know of the files."""
        dtype = str(self.stored_dtype).removeprefix("torch.")
        words = f"the model is {self.dequantized}; its weights were turned into ordinary ones of {dtype} first"
        return [*([words] if self.dequantized else []), *self.stored.notes, *self.stored.unused_notes]


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer, and check its weights.

    Args:
        name: a folder, a hub id, a .gguf file, or ``smollm2``.
        dtype: of the computation; "auto" is float32 on a processor and the stored dtype elsewhere.
        dequantize: turn weights that are quantized into ordinary ones.

    Raises:
        TwofoldError: if there is no such model, it is not whole, it is quantized, or a weight is NaN or infinite.
    """
    torch_device = choose_device(device)
    source, where, folder = locate(name, revision, trust_remote_code)
    shards = open_shards(folder, name)
    with _readable(name, "loaded"):
        config, model_class = config_and_class(source, where)
        how = quantized_by(config, shards)
        refuse_quantized(name, how, dequantize)
        if how and shards is None:
            source = _download(name, revision, ["*.safetensors", *PATTERNS])
            shards = open_shards(source, name)
        stored = Stored()
        if shards is not None and not how and is_plain(config, trust_remote_code):
            stored = _match(model_on_meta(model_class, config, trust_remote_code), shards, name)
        kept = dequantized_dtype(config, shards) if how else stored_dtype(config, stored)
        compute = compute_dtype(dtype, kept, torch_device)
        settings = {
            "dtype": compute,
            "use_safetensors": None if "gguf_file" in where else True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # they are refused below, by name
            **where,
        }
        with quiet_bars():
            generation, unreadable = stored_generation(source, where, config)
            if unreadable or how:
                settings["generation_config"] = generation
            notes: list[str] = []
            if how:
                assert shards is not None
                model, report, notes = load_dequantized(model_class, config, shards, source, name, how, **settings)
            else:
                model, report = model_class.from_pretrained(source, **settings)
    for key, shape, expected in sorted(report["mismatched_keys"]):
        check_shape(f"the weight {key}", f"the checkpoint {name}", tuple(shape), tuple(expected))
    check_missing(sorted(report["missing_keys"]), place=name)
    if "gguf_file" in where:
        forget_gguf(model)
    if not stored.keys:  # of the hub, with code of its own, or quantized
        stored = find_stored(model, None if how else shards, report["unexpected_keys"])
        check_depth_of_files(stored, model.state_dict(), name)
        part_by_files(model, stored, shards)
        kept = kept if how else stored_dtype(config, stored) or kept
    stored.notes += notes
    model = model.to(torch_device).eval()
    check_finite_weights(model, name)
    tokenizer, reason = read_tokenizer(source, where)
    fetch = partial(_download, name, revision, PATTERNS) if folder is None and "gguf_file" not in where else None
    return LoadedModel(
        model, tokenizer, name, folder, kept or compute, reason,
        shards=shards, stored=stored, dequantized=how, fetch=fetch, trusted=trust_remote_code,
    )  # fmt: skip


def _match(model: Any, shards: Shards, name: str) -> Stored:
    """Match the files with a model without weights.

    Raises:
        TwofoldError: if they do not fit it.
    """
    stored = find_stored(model, shards)
    check_fit(stored, model, name)
    part_by_files(model, stored, shards)
    return stored


def _readable(name: str, what: str = "read") -> AbstractContextManager[None]:
    def words(error: Exception) -> str:
        if needs_trust(error):
            return f"the model {name} {OWN_CODE}"
        return f"the model {name} can't be {what}: {first_line(error)}"

    return errors_in_words(words)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model without the model.

    Raises:
        TwofoldError: if there is no such model, or it has none.
    """
    source, where, folder = locate(name, None, trust_remote_code)
    tokenizer, reason = read_tokenizer(source, where)
    return need_tokenizer(LoadedModel(None, tokenizer, name, folder, torch.float32, reason))


def load_streamed(settings: Loading, chain: Chain) -> LoadedModel:
    """Open a model whose weights stay on disk, to be read block by block; see ``residence``.

    Args:
        chain: its blocks, as ``survey`` finds them.

    Raises:
        TwofoldError: if there is no such model, or it is not whole.
    """
    name, device = settings.model, choose_device(settings.device)
    source, where, folder = locate(name, settings.revision, settings.trust_remote_code)
    folder = folder or _download(name, settings.revision, ["*.safetensors", *PATTERNS])
    shards = open_shards(folder, name)
    assert shards is not None
    with _readable(name):
        config, model_class = config_and_class(source, where)
        refuse_quantized(name, quantized_by(config, shards), dequantize=False)
        stored = _match(model_on_meta(model_class, config, settings.trust_remote_code), shards, name)
        kept = stored_dtype(config, stored)
        dtype = compute_dtype(settings.dtype, kept, device)
        model = empty_model(model_class, config, dtype, settings.trust_remote_code)
        if model.can_generate():
            with quiet_bars():
                model.generation_config = stored_generation(source, where, config)[0]
    for weight in stored.parted:
        part_weight(model, weight)
    residence = Streamed(model, shards, stored, chain, dtype, device)
    tokenizer, reason = read_tokenizer(source, where)
    trusted = settings.trust_remote_code
    return LoadedModel(
        model, tokenizer, name, folder, kept or dtype, reason, residence, shards, stored, trusted=trusted
    )


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch files of a hub model, and return their folder."""
    with errors_in_words(lambda error: f"the model {name} can't be fetched: {first_line(error)}"):
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))


def load_skeleton(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, dequantize: bool = False
) -> LoadedModel:
    """Make a model without its weights, on the meta device: from the configuration alone, however large it is.

    A GGUF file is loaded whole, since its configuration stands in the file.

    Raises:
        TwofoldError: if there is no such model, or it is quantized and not to be dequantized.
    """
    if name.endswith(".gguf"):
        return load_model(name, trust_remote_code=trust_remote_code)
    source, where, folder = locate(name, revision, trust_remote_code)
    # A configuration alone will do.
    shards = open_shards(folder, name) if folder is not None and any(folder.glob("*.safetensors")) else None
    with _readable(name):
        config, model_class = config_and_class(source, where)
        how = quantized_by(config, shards)
        refuse_quantized(name, how, dequantize)
        quantization = quantization_of(config) or {}
        model = model_on_meta(model_class, without_quantization(config) if how else config, trust_remote_code)
        stored = Stored()
        if shards is not None and how:
            stored.notes += unpack(model, shards, quantization)[1]
        elif shards is not None and is_plain(config, trust_remote_code):
            stored = _match(model, shards, name)
        kept = dequantized_dtype(config, shards) if how else stored_dtype(config, stored) or torch.float32
    return LoadedModel(model.eval(), None, name, folder, kept, shards=shards, stored=stored, dequantized=how)


def targets_of(loaded: LoadedModel, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Targets:
    """Find the targets of a model as ``find_targets`` does, with what its files say of each weight, and what is left over.

    Raises:
        TwofoldError: if a pattern matches no linear layer, nothing is left to factorize, or weights are integers already.
    """
    weights, stored = find_targets(loaded.model, include, exclude), loaded.stored
    sizes = {name: dtype.itemsize for name, dtype in loaded.own_dtypes.items()}
    unused = sorted(stored.unused.items())
    return replace(
        weights,
        targets=[replace(t, element_bytes=sizes.get(f"{t.name}.weight")) for t in weights.targets],
        dense=[replace(weight, element_bytes=sizes.get(weight.name)) for weight in weights.dense],
        unused=tuple(UnusedTensor(key, stored.shape(key), reason) for key, reason in unused),
    )


def window_limit(model: Any) -> int | None:
    """Return the longest window that a model can read, None if its configuration sets no limit."""
    names = (
        "max_position_embeddings",
        "max_target_positions",
    )  # the latter, of the text that a decoder of speech writes
    longest = next((value for name in names if isinstance(value := getattr(model.config, name, None), int)), None)
    if longest is None:
        return None
    # RoBERTa's positions begin after the padding index.
    table = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    return longest - padding - 1 if isinstance(padding, int) else longest


def need_tokenizer(loaded: LoadedModel) -> Any:
    """Return the tokenizer of a model.

    Raises:
        TwofoldError: if it has none.
    """
    if loaded.no_tokenizer.endswith(OWN_CODE):
        raise TwofoldError(f"the tokenizer of {loaded.name} {OWN_CODE}")
    if loaded.tokenizer is None:
        raise TwofoldError(
            f"the model {loaded.name} has no tokenizer{f' ({loaded.no_tokenizer})' if loaded.no_tokenizer else ''}; "
            "put its files beside the weights, or pass tokenizer= with a model"
        )
    return loaded.tokenizer


def check_finite_weights(model: nn.Module, name: str) -> None:
    """Refuse a model with weights that are NaN or infinite.

    Raises:
        TwofoldError: naming the first such weight.
    """
    for key, tensor in model.state_dict().items():
        check_finite_tensor(key, tensor, name)


def vocabulary_size(model: Any) -> int | None:
    """Return how many tokens a model has an embedding for; None if that can't be told."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # a model of several inputs: it says itself what it does not run on
        return None
    weight = getattr(table, "weight", None)
    count = getattr(table, "num_embeddings", None if weight is None else len(weight))
    return count if isinstance(count, int) else None


def check_ids(ids: Tensor, loaded: LoadedModel) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        TwofoldError: if the tokenizer gives ids beyond the model's vocabulary.
    """
    count = vocabulary_size(loaded.model)
    if count is not None and ids.numel() and int(ids.max()) >= count:
        beyond = int(ids.max())
        word = "" if loaded.tokenizer is None else f" ({loaded.tokenizer.convert_ids_to_tokens(beyond)!r})"
        raise TwofoldError(
            f"the tokenizer of {loaded.name} gives the token id {beyond}{word}, the model has only {count} "
            "embeddings; they do not belong together: take the tokenizer that the model was trained with, or give the model rows "
            "for the tokens that were added (resize_token_embeddings)"
        )
