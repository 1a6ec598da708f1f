"""Layers of integers in a checkpoint: the ties that there are, and what was loaded into them checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twofold.errors import TwofoldError
from twofold.nn.int_matrix import IntMatrix
from twofold.nn.layers.tied import TiedLinear


def mind_ties(model: Any, *, dense: bool = False) -> None:
    """Let transformers tie the parameters that there are: an output layer that shares a table of integers has none to tie.

    Args:
        dense: whether there were such layers before, and are none now.
    """
    if not hasattr(model, "get_expanded_tied_weights_keys"):
        return
    ours = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TiedLinear)}
    if not ours and not dense:
        return
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.all_tied_weights_keys = {key: source for key, source in ties.items() if key not in ours}
    if not ours:
        model.tie_weights()


def check_loaded(rounded: Mapping[str, IntMatrix]) -> None:
    """Refuse integers of another shape than config.json says, scales that are no numbers, and what was not in the checkpoint.

    Raises:
        TwofoldError: naming the first one.
    """
    for name, matrix in rounded.items():
        wrong = matrix.index_error()
        if wrong is not None:
            raise TwofoldError(f"{name}.{wrong}; fetch the checkpoint again")
    buffers = {f"{name}.{leaf}": buffer for name, matrix in rounded.items() for leaf, buffer in matrix.named_buffers()}
    # Loaded tensors carry this mark; those that transformers filled in do not.
    loaded = {name: bool(getattr(b, "_is_hf_initialized", False)) for name, b in buffers.items() if not b.is_meta}
    absent = [name for name, found in loaded.items() if not found]
    if absent and len(absent) < len(loaded):
        raise TwofoldError(
            f"the checkpoint is not whole: it lacks {len(absent)} parts of its integers, first {absent[0]}; fetch it again"
        )
