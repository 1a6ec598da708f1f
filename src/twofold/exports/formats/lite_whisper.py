"""LiteWhisper's layout (Kamahori et al., EMNLP 2025): Whisper with an encoder of plain factors, and graphs for transformers.js.

A layer of rank r has ``weight1`` (in, r), ``weight2`` (r, out) and ``bias`` (out,), and y = x weight1 weight2 + bias. config.json
says its rank in ``low_rank_config``, which has a table for each layer of the encoder. What has no entry is as in any Whisper.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from twofold.checkpoint.beside import WHOLE, read_settings
from twofold.errors import TwofoldError
from twofold.exports.decoding import Decoder, ModelDecoder, encoder_input
from twofold.exports.formats import EXTRA, Source, Written, export_format
from twofold.exports.formats.dense import save_dense
from twofold.exports.layers import compact_layers
from twofold.linalg.gauge import plain_storage
from twofold.model.load import LoadedModel
from twofold.nn.compact import CompactLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.shared import SharedLinear
from twofold.nn.places import replace_module

TYPE, CLASS, NATIVE = "lite-whisper", "LiteWhisperForConditionalGeneration", "WhisperForConditionalGeneration"
NOT_WHISPERS = {"model_type", "architectures", "transformers.js_config"}  # what config.json says for other readers
ENCODER, HEAD, TABLE = "model.encoder.layers.", "proj_out.weight", "model.decoder.embed_tokens.weight"
ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")
# Where a key of the table stands in a layer.
PLACES = {key: f"self_attn.{key}" for key in ATTENTION} | {"fc1": "fc1", "fc2": "fc2"}
GRAPHS, RUNTIME = "onnx", ("onnx", "onnxscript", "onnxruntime")
PREPROCESSOR = "preprocessor_config.json"
POSITIONS = 50  # of the encoder, a second of speech


class LowRank(nn.Module):
    """y = x A B + b, A (in, r) and B (r, out), with the names that LiteWhisper's classes give them."""

    def __init__(self, weight1: Tensor, weight2: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight1, self.weight2 = nn.Parameter(weight1), nn.Parameter(weight2)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) → (..., out)
        return x @ self.weight1 @ self.weight2 + self.bias


def refuse_others(loaded: LoadedModel) -> None:
    """Refuse what the layout does not hold.

    Raises:
        TwofoldError: if it is no Whisper model that writes text, nothing of its encoder is factored, or layers share a basis.
    """
    name, layers = loaded.name, compact_layers(loaded.model)
    if type(loaded.model).__name__ != NATIVE:
        raise TwofoldError(
            f"`to={TYPE}` takes Whisper models, and {name} is a {type(loaded.model).__name__}; use `to=dense` or `to=portable`"
        )
    if not any(key.startswith(ENCODER) for key in layers):
        raise TwofoldError(
            f"{name} has no factored layer in its encoder, and LiteWhisper's layout has them nowhere else; compress it with "
            "`include=model.encoder.*`, or use `to=portable`"
        )
    for key, layer in layers.items():
        if isinstance(layer, SharedLinear):
            raise TwofoldError(
                f"{key} of {name} shares its basis with others, which LiteWhisper's layout does not hold; use `to=portable`, or "
                "an objective that factorizes each layer by itself"
            )


@export_format(TYPE, factored=True, beside=WHOLE, refuse=refuse_others)
def write_lite_whisper(source: Source, folder: Path) -> Written:
    """Write the graphs, where their packages are installed, and then the weights with the encoder's factors made plain."""
    graphs, about, also = _write_graphs(source, folder / GRAPHS)
    notes = [graphs, *_write_processor(source, folder)]
    layers = compact_layers(source.model)
    ranks = make_plain(source.model, layers)
    save_dense(source, folder)
    path = folder / "config.json"
    config = read_settings(path) | {"model_type": TYPE, "architectures": [CLASS], "low_rank_config": ranks} | about
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Written(lambda: ModelDecoder(read_lite_whisper(folder)), [_words(layers, ranks), *notes], also=also)


def make_plain(model: Any, layers: Mapping[str, CompactLinear]) -> list[dict[str, int]]:
    """Put plain factors in the place of an encoder's factored layers, in a model: the very numbers, and those of an identity.

    Layers whose plain factors would be larger than their matrix stay as they are, and are merged with all others.

    Returns:
        The ranks of the layers that have plain factors, a table for each layer of the encoder.
    """
    ranks: list[dict[str, int]] = [{} for _ in range(model.config.encoder_layers)]
    for number, table in enumerate(ranks):
        for key, place in PLACES.items():
            name = f"{ENCODER}{number}.{place}"
            layer = layers.get(name)
            if type(layer) is FactoredLinear and _is_smaller(layer, key):
                left, right = layer.factors(layer.weight.dtype)
                bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
                replace_module(model, name, LowRank(right.T.contiguous(), left.T.contiguous(), bias.to(left.dtype)))
                table[key] = layer.rank
    return ranks


def _is_smaller(layer: FactoredLinear, key: str) -> bool:
    """Say whether plain factors take less than the matrix; a bias that Whisper's keys do not have goes with factors alone."""
    m, n = layer.out_features, layer.in_features
    return plain_storage(m, n, layer.rank) < m * n or (key == "k_proj" and layer.bias is not None)


def read_lite_whisper(folder: Path) -> Any:
    """Read a folder in LiteWhisper's layout as a Whisper model, in float32."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    settings = read_settings(folder / "config.json")
    ranks = settings.pop("low_rank_config")
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(
            WhisperConfig(**{k: settings[k] for k in settings.keys() - NOT_WHISPERS})
        )
        for number, table in enumerate(ranks):
            for key, rank in table.items():
                name = f"{ENCODER}{number}.{PLACES[key]}"
                m, n = model.get_submodule(name).weight.shape
                replace_module(model, name, LowRank(torch.empty(n, rank), torch.empty(rank, m), torch.empty(m)))
    stored = {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
    stored.setdefault(HEAD, stored[TABLE])  # one weight, which is stored once
    model.load_state_dict(stored, assign=True)
    return model.float().eval()


def _write_graphs(source: Source, folder: Path) -> tuple[str, dict[str, Any], tuple[Callable[[], Decoder], ...]]:
    """Write the graphs of a model as it is, if their packages are installed.

    Returns:
        A note, what config.json tells transformers.js of them, and how they are read again.
    """
    missing = [name for name in RUNTIME if importlib.util.find_spec(name) is None]
    if missing:
        return f"No graphs for transformers.js were written, which needs {' and '.join(missing)}: {EXTRA}.", {}, ()
    from twofold.exports.speech_graphs import SpeechGraphs, save_speech_graphs

    beside = save_speech_graphs(source.model, source.loaded.name, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    note = (
        f"{folder.name}/ has two graphs for transformers.js and ONNX Runtime: {size / 1e6:.2f} MB, in float32, with all factors "
        "as the model has them."
    )
    features = encoder_input(source.model)
    assert features is not None
    about: dict[str, Any] = {"dtype": "fp32"} | ({"use_external_data_format": beside} if beside else {})
    return note, {"transformers.js_config": about}, (lambda: SpeechGraphs(folder, features),)


def _write_processor(source: Source, folder: Path) -> list[str]:
    """Write what transformers.js asks for beside the weights where the model's folder has it in another form.

    That is a file of settings for the features, and a tokenizer that its configuration calls Whisper's.

    Returns:
        Notes on what was not there.
    """
    from transformers import WhisperFeatureExtractor, WhisperTokenizer

    loaded, config, notes = source.loaded, source.model.config, []
    place = loaded.source or loaded.name
    if loaded.tokenizer is not None and not isinstance(loaded.tokenizer, WhisperTokenizer):
        loaded.tokenizer = WhisperTokenizer.from_pretrained(place)  # which is written in the place of the other one
    if loaded.source is None or not (loaded.source / PREPROCESSOR).is_file():
        try:
            processor = WhisperFeatureExtractor.from_pretrained(place)
        except (OSError, ValueError):
            processor = WhisperFeatureExtractor(
                feature_size=config.num_mel_bins, chunk_length=max(1, config.max_source_positions // POSITIONS)
            )
            notes.append(f"{loaded.name} has no settings for the features; {PREPROCESSOR} has Whisper's own.")
        processor.save_pretrained(folder)
    return notes


def _words(layers: Mapping[str, CompactLinear], ranks: list[dict[str, int]]) -> str:
    """Tell which layers the layout keeps as factors."""
    encoder = [layer for name, layer in layers.items() if name.startswith(ENCODER)]
    kept, others = sum(map(len, ranks)), sum(type(layer) is not FactoredLinear for layer in encoder)
    larger, decoder = len(encoder) - kept - others, len(layers) - len(encoder)
    said = [
        f"model.safetensors keeps {kept} of {len(encoder)} factored layers of the encoder as plain factors of their rank"
    ]
    if larger:
        said.append(
            f"{larger} are merged, since plain factors of their rank are larger than the matrix (compress with `form=plain`)"
        )
    if others:
        said.append(f"{others} are merged, which are no products of two matrices")
    if decoder:
        said.append(f"{decoder} layers outside of it are merged, as LiteWhisper's classes ask for")
    return "; ".join(said) + "."
