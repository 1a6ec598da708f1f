"""The shards of a linear layer as vLLM has it: q, k and v of a qkv_proj, gate and up of a gate_up_proj, or one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twofold.errors import TwofoldError
from twofold.nn.layers.factored import FactoredLinear
from twofold.vllm_plugin.supported import INSTEAD

Form = Literal["dense", "plain", "rows", "columns"]
LETTERS = {"q": 0, "k": 1, "v": 2}  # vLLM's ids of the shards of a qkv_proj; others are counted


@dataclass(frozen=True)
class Shard:
    """One projection of the original model, dense or as ``FactoredLinear`` holds it."""

    name: str
    inputs: int  # n
    outputs: int  # m
    form: Form = "dense"
    rank: int = 0
    reduce: tuple[int, int] = (0, 0)  # the shapes of its tensors in the checkpoint
    expand: tuple[int, int] = (0, 0)
    order: int = 0  # the length of its order

    @property
    def reads_input(self) -> bool:
        """Whether its right factor is applied to the input as it comes, so that it can be one product with others'."""
        return self.form in ("plain", "rows")


def original_names(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """The names in the checkpoint of what vLLM calls ``prefix``: one, or several where vLLM merges them.

    Args:
        packed: vLLM's ``packed_modules_mapping`` of the model: the last part of a merged name to those of its parts.
    """
    parent, dot, last = prefix.rpartition(".")
    return [f"{parent}{dot}{part}" for part in packed.get(last, [last])]


def factored_names(prefix: str, packed: Mapping[str, Sequence[str]], modules: Mapping[str, Any]) -> list[str]:
    """The names of a layer's shards, if at least one of them is factored, else nothing.

    A layer that is merged in the original already (Phi-3's qkv_proj) has one shard.
    """
    if prefix in modules:
        return [prefix]
    names = original_names(prefix, packed)
    return names if any(name in modules for name in names) else []


def shards_of(
    prefix: str, names: Sequence[str], modules: Mapping[str, Mapping[str, Any]], inputs: int, outputs: Sequence[int]
) -> list[Shard]:
    """The shards of one layer.

    Args:
        prefix: its name in vLLM.
        names: those of its shards in the checkpoint.
        modules: the settings of the factored ones, from config.json.
        inputs: n.
        outputs: m of each shard, as vLLM has them.

    Raises:
        TwofoldError: if vLLM merges other parts than are named, or a rank does not fit.
    """
    if len(names) == 1:
        outputs = [sum(outputs)]
    if len(names) != len(outputs):
        raise TwofoldError(
            f"vLLM makes {prefix} of {len(outputs)} parts where {len(names)} are known ({', '.join(names)}), so the plug-in "
            f"can't tell which is which; {INSTEAD}"
        )
    return [_shard(name, modules.get(name), inputs, size) for name, size in zip(names, outputs, strict=True)]


def _shard(name: str, settings: Mapping[str, Any] | None, inputs: int, outputs: int) -> Shard:
    if settings is None:
        return Shard(name, inputs, outputs)
    form = settings.get("form", "plain")
    try:
        layer = FactoredLinear(inputs, outputs, settings["rank"], form, bias=False, device="meta")
    except ValueError as error:
        raise TwofoldError(f"the plan of {name} in the checkpoint does not fit: {error}") from error
    (r, k), (rest, _) = layer.reduce.weight.shape, layer.expand.weight.shape
    order = 0 if layer.order is None else len(layer.order)
    return Shard(name, inputs, outputs, form, r, (r, k), (rest, r), order)


def shard_index(shard_id: Any, shards: Sequence[Shard]) -> int:
    """The place of the shard that vLLM's id names: "q", "k", "v", a number, or nothing for a layer of one.

    Raises:
        TwofoldError: if it names none, or the checkpoint holds a tensor for several.
    """
    if shard_id is None and len(shards) == 1:
        return 0
    index = LETTERS.get(shard_id) if isinstance(shard_id, str) else shard_id
    if type(index) is not int or not 0 <= index < len(shards):
        names = ", ".join(shard.name for shard in shards)
        raise TwofoldError(
            f"vLLM gave a tensor for the part {shard_id!r} of {names}, which the plug-in can't place; {INSTEAD}"
        )
    return index
