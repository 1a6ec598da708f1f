"""What a model must move and multiply for a token, whatever runs it: the measure of what a speed-up can be.

For one token every weight is read once, so decoding is bound by bytes; for a long prompt each weight is used for every token, so
reading is bound by multiplications.
"""

from __future__ import annotations

from typing import Any

import pydantic
from torch import nn
from transformers.pytorch_utils import Conv1D

from twofold.model.head import output_layer
from twofold.nn.int_matrix import IntMatrix
from twofold.nn.layers.shared import SharedLinear


class TokenWork(pydantic.BaseModel, extra="forbid"):
    """The work of one model for a token, in bytes and multiplications."""

    weight_bytes: int  # read for a step, however many sequences there are
    multiplications: int  # by the weights for one token, without the output layer
    head: int  # by the output layer for one token
    cache_bytes: int  # keys and values of one token of one sequence
    attended: int  # multiplications of one query with one key and its value, in all layers

    def decode_bytes(self, batch: int, context: float) -> float:
        """Return the bytes that one step moves for ``batch`` sequences of ``context`` tokens."""
        return self.weight_bytes + batch * context * self.cache_bytes

    def decode_multiplications(self, batch: int, context: float) -> float:
        """Return the multiplications of one step for ``batch`` sequences of ``context`` tokens."""
        return batch * (self.multiplications + self.head + context * self.attended)

    def prefill_multiplications(self, tokens: int) -> float:
        """Return the multiplications of a prompt: its last token alone gets logits, each looks back at half of it on average."""
        return tokens * self.multiplications + self.head + tokens * tokens / 2 * self.attended


def work_of(model: Any) -> TokenWork | None:
    """Count the work of a transformers model from its modules; of a factored one, before it has its inference form.

    None for a model with integers, which are read in few bytes and turned back into numbers: it has no such bound.
    """
    if any(isinstance(module, IntMatrix) for module in model.modules()):
        return None
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables -= {id(module.weight) for module in linears}  # of what is left a step reads a few rows
    output = output_layer(model)
    head = sum(module.weight.numel() for module in linears if module is output)
    multiplications = sum(module.weight.numel() for module in linears) - head
    # Each layer with a shared basis applies it in full; among the modules it was counted once.
    bases = [module.basis for module in model.modules() if isinstance(module, SharedLinear)]
    multiplications += sum(basis.numbers for basis in bases) - sum(basis.numbers for basis in set(bases))
    read = [p for p in model.parameters() if id(p) not in tables]
    element = read[0].element_size() if read else 4
    layers, width, values = _attention(model.config.get_text_config())
    return TokenWork(
        weight_bytes=sum(p.numel() * p.element_size() for p in read),
        multiplications=multiplications,
        head=head,
        cache_bytes=2 * layers * values * element,
        attended=2 * layers * width,
    )


def _attention(config: Any) -> tuple[int, int, int]:
    """Return the layers, the width of all queries, and that of all keys; zeros where the configuration does not say."""
    heads = getattr(config, "num_attention_heads", None) or 0
    layers = getattr(config, "num_hidden_layers", None) or 0
    if not heads or not layers:
        return 0, 0, 0
    dim = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return int(layers), int(heads * dim), int(keys * dim)
