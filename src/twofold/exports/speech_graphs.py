"""Whisper as two ONNX graphs, of its encoder and of its decoder, with the names that transformers.js knows.

One graph of the decoder serves the first call and the later ones, since an empty cache is a cache too. The keys and values of the
speech are made of those states of the encoder that the cache does not have yet: of all at the first call, of none later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from twofold.exports.formats.onnx import forget_trace, open_session
from twofold.exports.graph import exporting

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
PAST, PRESENT = "past_key_values", "present"
LARGEST = 2**31 - 2**24  # bytes of the weights inside of a graph's file, which protobuf holds below 2 GiB


def save_speech_graphs(model: Any, name: str, folder: Path) -> dict[str, int]:
    """Trace a Whisper model, whatever its layers are, and save its graphs in float32.

    Args:
        name: of the model, for messages.

    Returns:
        For each graph whose weights stand beside it, the number of files that hold them.

    Raises:
        TwofoldError: if a layer can't be expressed in ONNX.
    """
    config, batch = model.config, Dim("batch_size")
    encoder, decoder = SpeechEncoder(model).eval(), TextDecoder(model).eval()
    features = torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions)
    inputs, shapes = _decoder_inputs(config, batch)
    caches = cache_names(config.decoder_layers)
    presents = [cache.replace(PAST, PRESENT) for cache in caches]
    folder.mkdir()
    with exporting("onnx", model, name), _plain_attention(model):
        beside = [
            _save(folder / ENCODER, encoder, (features,), ({0: batch},), ["input_features"], ["last_hidden_state"]),
            _save(
                folder / DECODER, decoder, inputs, shapes, ["input_ids", "encoder_hidden_states", *caches],
                ["logits", *presents],
            ),
        ]  # fmt: skip
    return {file: 1 for file, large in zip((ENCODER, DECODER), beside, strict=True) if large}


class SpeechEncoder(nn.Module):
    """Features (batch, bins, frames) → states (batch, frames / 2, width)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_features: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_features).last_hidden_state
        return states


class SpeechLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache that remembers what was added last."""

    added: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.added = key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)


class TextDecoder(nn.Module):
    """Tokens, the encoder's states and the cache → logits, and what the cache is to have next.

    Of the keys and values of the speech, only those that were not in the cache are given back: none at all after the first call.
    So a program does not copy what never changes, and one that keeps what the first call gave it is right.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,  # (batch, tokens)
        encoder_hidden_states: Tensor,  # (batch, states, width)
        past: list[Tensor],  # (batch, heads, length, width of a head): four a layer, by ``cache_names``
    ) -> tuple[Tensor, ...]:  # (batch, tokens, vocabulary), and as ``past``
        layers = range(0, len(past), 4)
        text, speech = [DynamicLayer() for _ in layers], [SpeechLayer() for _ in layers]
        for at, mine, heard in zip(layers, text, speech, strict=True):
            mine.update(past[at], past[at + 1])
            heard.update(past[at + 2], past[at + 3])
        cache = EncoderDecoderCache(Cache(layers=text), Cache(layers=speech))
        cache.is_updated = {}  # so that the states that are given are added to those in the cache
        known = past[2].shape[2]
        states = self.model.get_decoder()(
            input_ids=input_ids,
            encoder_hidden_states=encoder_hidden_states[:, known:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        present: list[Tensor] = []
        for mine, heard in zip(text, speech, strict=True):
            present += [mine.keys, mine.values, *heard.added]
        return self.model.get_output_embeddings()(states), *present


def cache_names(layers: int) -> list[str]:
    """Return the names of the inputs that hold the cache, in the order of ``TextDecoder``."""
    return [
        f"{PAST}.{layer}.{of}.{what}"
        for layer in range(layers)
        for of in ("decoder", "encoder")
        for what in ("key", "value")
    ]


def _decoder_inputs(config: Any, batch: Dim) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return samples for the tracing of ``TextDecoder``, and which of their sizes stay open: not that of the encoder's states."""
    heads, width, states = config.decoder_attention_heads, config.d_model, config.max_source_positions
    tokens, of_text = Dim("decoder_sequence_length"), Dim("past_decoder_sequence_length")
    of_speech = Dim("past_encoder_sequence_length", max=states)
    layers = range(config.decoder_layers)
    past = [torch.zeros(2, heads, length, width // heads) for _ in layers for length in (4, 4, 5, 5)]
    lengths = [{0: batch, 2: length} for _ in layers for length in (of_text, of_text, of_speech, of_speech)]
    inputs = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, states, width), past
    return inputs, ({0: batch, 1: tokens}, {0: batch}, lengths)


def _save(file: Path, module: nn.Module, inputs: Any, shapes: Any, given: list[str], returned: list[str]) -> bool:
    """Trace a module and save its graph; say whether its weights had to stand beside it."""
    import onnx_ir

    traced = torch.onnx.export(
        module, inputs, dynamo=True, dynamic_shapes=shapes, input_names=given, output_names=returned, verbose=False
    )
    assert traced is not None
    graph = traced.model
    forget_trace(graph)
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    large = weights > LARGEST
    onnx_ir.save(graph, file, external_data=f"{file.name}_data" if large else None)
    return large


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Let a model compute attention by plain products, which runtimes fuse better than what else is traced."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class SpeechGraphs:
    """The two graphs as one decoder, on the processor, behind features that are always the same.

    Args:
        features: (1, bins, frames).
    """

    def __init__(self, folder: Path, features: Tensor, threads: int | None = None) -> None:
        heard = open_session(folder / ENCODER, threads).run(None, {"input_features": features.numpy()})
        self._states = heard[0]
        self._session = open_session(folder / DECODER, threads)
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._past = {
            node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
            for node in self._session.get_inputs()
            if node.name.startswith(PAST)
        }
        self.start()

    def start(self) -> None:
        self._cache = {**self._past}

    def read(self, ids: Tensor) -> Tensor:  # (1, tokens, vocabulary)
        feed = {"input_ids": ids.cpu().numpy(), "encoder_hidden_states": self._states, **self._cache}
        out = dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        for name, value in self._cache.items():
            if (
                ".decoder." in name or not value.shape[2]
            ):  # the keys and values of the speech are those of the first call
                self._cache[name] = out[name.replace(PAST, PRESENT)]
        return torch.from_numpy(out["logits"])
