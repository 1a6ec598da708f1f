"""What a model must move and multiply for a token, whatever runs it: the measure of what a speed-up can be.

For one token every weight is read once, so decoding is bound by bytes; for a long prompt each weight is used for every token, so
reading is bound by multiplications.
"""

from __future__ import annotations

from typing import Any

import pydantic
from torch import nn
from transformers.pytorch_utils import Conv1D

from twofold.nn.int_matrix import IntMatrix
from twofold.nn.layers.shared import SharedLinear


class Work(pydantic.BaseModel, extra="forbid"):
    """Of one model, in bytes and multiplications."""

    weight_bytes: int  # read for a step, however many sequences there are
    multiplications: int  # by the weights for one token, without the output layer
    head: int  # by the output layer for one token
    cache_bytes: int  # keys and values of one token of one sequence
    attended: int  # multiplications of one query with one key and its value, in all layers

    def decode_bytes(self, batch: int, context: float) -> float:
        """Moved for one step of ``batch`` sequences that have ``context`` tokens."""
        return self.weight_bytes + batch * context * self.cache_bytes

    def decode_multiplications(self, batch: int, context: float) -> float:
        """For one step of ``batch`` sequences that have ``context`` tokens."""
        return batch * (self.multiplications + self.head + context * self.attended)

    def prefill_multiplications(self, tokens: int) -> float:
        """For a prompt: the output layer for its last token alone, and each token looks back at half of it on average."""
        return tokens * self.multiplications + self.head + tokens * tokens / 2 * self.attended


def work_of(model: Any) -> Work | None:
    """Count the work of a transformers model from its modules; a factored one before it has its inference form.

    None for a model with integers, which are read in few bytes and turned back into numbers: there is no ideal of that kind.
    """
    if any(isinstance(module, IntMatrix) for module in model.modules()):
        return None
    get_output = getattr(model, "get_output_embeddings", None)
    output = id(get_output()) if callable(get_output) else None
    product: set[int] = set()  # weights that inputs are multiplied with
    looked_up: set[int] = set()  # tables of which a step reads a few rows
    multiplications = head = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            product.add(id(module.weight))
            if id(module) == output:
                head += module.weight.numel()
            else:
                multiplications += module.weight.numel()
        elif isinstance(module, nn.Embedding):
            looked_up.add(id(module.weight))
        if isinstance(module, SharedLinear):  # each of its layers applies a shared basis in full
            multiplications += module.basis.numbers
    bases = {id(m.basis): m.basis.numbers for m in model.modules() if isinstance(m, SharedLinear)}
    multiplications -= sum(bases.values())  # counted once as modules
    read = [p for p in model.parameters() if id(p) not in looked_up - product]
    element = read[0].element_size() if read else 4
    config = model.config.get_text_config()
    layers, width, values = _attention(config)
    return Work(
        weight_bytes=sum(p.numel() * p.element_size() for p in read),
        multiplications=multiplications,
        head=head,
        cache_bytes=2 * layers * values * element,
        attended=2 * layers * width,
    )


def _attention(config: Any) -> tuple[int, int, int]:
    """Layers, the width of all queries, and the width of all keys; zeros where the configuration does not say."""
    heads = getattr(config, "num_attention_heads", None) or 0
    layers = getattr(config, "num_hidden_layers", None) or 0
    if not heads or not layers:
        return 0, 0, 0
    dim = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return int(layers), int(heads * dim), int(keys * dim)
