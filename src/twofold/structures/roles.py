"""Which weights might form a structure: siblings with the names and shapes of a role. ``check`` makes sure that they do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Heads:
    queries: int
    keys: int
    dim: int  # of queries and keys
    value_dim: int


def candidates(model: nn.Module, targets: Iterable[Target], kinds: Iterable[str]) -> list[Structure]:
    """The structures of targets that the names and shapes of the model's layers allow; each target is in one at the most."""
    siblings: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            parent, _, child = name.rpartition(".")
            m, n = dense_weight(module).shape
            siblings.setdefault(parent, {})[child] = m, n
    found = [
        structure
        for parent, shapes in siblings.items()
        for structure in [*_mlp(parent, shapes), *_attention(model, parent, shapes)]
    ]
    chosen, kinds = {target.name for target in targets}, set(kinds)
    return [s for s in found if s.kind in kinds and all(member.name in chosen for member in s.members)]


def alone(targets: Iterable[Target], form: Literal["gauge", "plain"]) -> list[Structure]:
    """Each target as a structure of its own, whose sizes are the ranks that store less than the dense weight."""
    found = []
    for target in targets:
        m, n = target.out_features, target.in_features
        largest = (m * n - 1) // (m + n) if form == "plain" else min(m, n) - 1
        found.append(Structure("dense-columns", (Member(target.name, form, 1),), largest + 1))
    return found


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
    for names in ATTENTION:
        if not all(name in shapes for name in names):
            continue
        q, k, v, o = (f"{parent}.{name}" for name in names)
        heads = _heads(model, parent, *(shapes[name] for name in names))
        if heads is None:
            return []
        values = Member(v, "kept-rows", heads.keys), Member(o, "kept-columns", heads.queries)
        queries = Member(k, "kept-rows", heads.keys), Member(q, "kept-rows", heads.queries)
        return [
            Structure("value-output", values, heads.value_dim, heads.queries, heads.keys, o),
            Structure("query-key", queries, heads.dim, heads.queries, heads.keys, o),
        ]
    return []


def _heads(
    model: nn.Module,
    parent: str,
    q: tuple[int, int],  # shapes (out, in)
    k: tuple[int, int],
    v: tuple[int, int],
    o: tuple[int, int],
) -> _Heads | None:
    """The heads of an attention, from what its module or the configuration says; None if the shapes do not agree."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    count = getattr(config, "num_attention_heads", None)
    dim = getattr(model.get_submodule(parent), "head_dim", None) or getattr(config, "head_dim", None)
    if not dim and count:
        dim = q[0] // int(count)
    if not dim or q[0] % dim or k[0] % dim:
        return None
    queries, keys = q[0] // dim, k[0] // dim
    if not keys or queries % keys or v[0] % keys or o[1] != queries * (v[0] // keys):
        return None
    return _Heads(queries, keys, int(dim), v[0] // keys)
