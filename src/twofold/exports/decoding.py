"""Greedy decoding, the same for every form that a model is in."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Decoder(Protocol):
    """Reads token ids piece by piece and remembers what it has read."""

    def start(self) -> None:
        """Forget what was read."""

    def read(
        self,
        ids: Tensor,  # (batch, tokens)
    ) -> Tensor:  # (batch, tokens, vocabulary), or (batch, 1, vocabulary) where only the last are computed
        """Read more tokens and return the logits behind them."""


class GraphDecoder(Decoder, Protocol):
    """Runs an exported graph."""

    sizes: tuple[int | None, ...]  # sequences, and tokens of each, that it reads at once; None for any number


class ModelDecoder:
    """A model of transformers that decodes, with its own cache; without one, everything is read again.

    The decoder of one that has an encoder writes behind what that one makes of ``encoder_input``.
    """

    @torch.inference_mode()
    def __init__(self, model: Any) -> None:
        self.model = model
        self._ids, self._encoded = "input_ids", {}
        if getattr(model.config, "is_encoder_decoder", False):  # this file is read where there is no twofold
            inputs = encoder_input(model)
            assert inputs is not None
            states = model.get_encoder()(inputs.to(model.device))
            self._ids, self._encoded = "decoder_input_ids", {"encoder_outputs": states}
        self.start()

    def start(self) -> None:
        self._past: Any = None
        self._read: Tensor | None = None

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:  # (batch, tokens, vocabulary)
        ids = ids.to(self.model.device)
        whole = ids if self._read is None else torch.cat([self._read, ids], 1)
        past = {} if self._past is None else {"past_key_values": self._past}
        out = self.model(**{self._ids: ids if past else whole}, **past, **self._encoded)
        self._past, self._read = getattr(out, "past_key_values", None), whole
        logits: Tensor = out.logits[:, -ids.shape[1] :]
        return logits


def encoder_input(model: Any) -> Tensor | None:
    """Draw what the encoder of a model reads, the same each time.

    Returns:
        Token ids (1, 16), or log-mel features (1, bins, frames) as Whisper has them; None if it reads anything else.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids" and hasattr(config, "vocab_size"):
        return torch.randint(config.vocab_size, (1, 16), generator=generator)
    if model.main_input_name == "input_features" and hasattr(config, "num_mel_bins"):
        return torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    return None


def greedy(
    decoder: Decoder,
    ids: Tensor,  # (batch, tokens)
    count: int,
) -> tuple[Tensor, Tensor]:  # (batch, count), (batch, count)
    """Decode the most likely ``count`` tokens after a prompt, one after another, through any end of the text.

    Returns:
        The tokens, and for each how far its logit is above that of the second one.
    """
    decoder.start()
    tokens, leads = [], []
    for _ in range(count):
        best = decoder.read(ids)[:, -1].float().topk(2)
        ids = best.indices[:, :1]
        tokens.append(ids)
        leads.append(best.values[:, 0] - best.values[:, 1])
    return torch.cat(tokens, 1), torch.stack(leads, 1)
