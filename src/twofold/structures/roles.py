"""Which weights might form a structure: siblings with the names and shapes of a role. ``check`` makes sure that they do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from twofold.model.kinds import dense_weight
from twofold.model.structure import Member, Structure
from twofold.model.target import Target

# Names in one parent module. A row more serves another family; what does not fit fails the check and stays dense.
MLP = (  # the weights that make the hidden units, and the one that reads them
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),  # OPT, Phi
    (("c_fc",), "c_proj"),  # GPT-2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
    (("fc_in",), "fc_out"),  # GPT-J
)
ATTENTION = (  # queries, keys, values, output
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, GPT-J
    ("q_proj", "k_proj", "v_proj", "dense"),  # Phi
)


def candidates(model: nn.Module, targets: Iterable[Target], kinds: Iterable[str]) -> list[Structure]:
    """Find the structures of targets that the names and shapes of the model's layers allow; each target is in one at the most."""
    siblings: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            parent, _, child = name.rpartition(".")
            m, n = dense_weight(module).shape
            siblings.setdefault(parent, {})[child] = m, n
    structures = [
        structure
        for parent, shapes in siblings.items()
        for structure in [*_mlp(parent, shapes), *_attention(model, parent, shapes)]
    ]
    names, kinds = {target.name for target in targets}, set(kinds)
    return [s for s in structures if s.kind in kinds and all(member.name in names for member in s.members)]


def alone(targets: Iterable[Target], form: Literal["gauge", "plain"]) -> list[Structure]:
    """Return each target as a structure of its own."""
    return [
        Structure(
            "dense-columns", (Member(target.name, form, 1),), rank_sizes(target.out_features, target.in_features, form)
        )
        for target in targets
    ]


def rank_sizes(out_features: int, in_features: int, form: Literal["gauge", "plain"]) -> int:
    """Count the sizes of a weight that are ranks: those that store less than the dense weight, and it."""
    if form == "gauge":
        return min(out_features, in_features)
    return (out_features * in_features - 1) // (out_features + in_features) + 1


def _mlp(
    parent: str,
    shapes: dict[str, tuple[int, int]],  # (out, in) by name
) -> list[Structure]:
    for makers, reader in MLP:
        if reader in shapes and all(name in shapes for name in makers):
            units = shapes[reader][1]
            if all(shapes[name][0] == units for name in makers):
                rows = [Member(f"{parent}.{name}", "kept-rows", 1) for name in makers]
                columns = Member(f"{parent}.{reader}", "kept-columns", 1)
                return [Structure("mlp", (*rows, columns), units, watched=columns.name)]
    return []


def _attention(model: nn.Module, parent: str, shapes: dict[str, tuple[int, int]]) -> list[Structure]:
    names = next((names for names in ATTENTION if all(name in shapes for name in names)), None)
    if names is None:
        return []
    (queries, _), (keys, _), (values, _), (_, inputs) = (shapes[name] for name in names)
    dim = _head_dim(model, parent, queries)
    if not dim or queries % dim or keys % dim:
        return []
    heads, key_heads = queries // dim, keys // dim
    if not key_heads or heads % key_heads or values % key_heads or inputs != heads * (values // key_heads):
        return []
    q, k, v, o = (f"{parent}.{name}" for name in names)
    value_output = Member(v, "kept-rows", key_heads), Member(o, "kept-columns", heads)
    query_key = Member(k, "kept-rows", key_heads), Member(q, "kept-rows", heads)
    return [
        Structure("value-output", value_output, values // key_heads, heads, key_heads, o),
        Structure("query-key", query_key, dim, heads, key_heads, o),
    ]


def _head_dim(model: nn.Module, parent: str, queries: int) -> int:
    """Return the dimensions of a head, from what its module or the configuration says; 0 where neither does."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    dim = getattr(model.get_submodule(parent), "head_dim", None) or getattr(config, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    return int(dim or (queries // int(heads) if heads else 0))
