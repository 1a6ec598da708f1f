"""The modules of a checkpoint in vLLM: those that it can hold, and the shards of its merged layers, as q, k and v of qkv_proj."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twofold.checkpoint.plugin import stored_kind
from twofold.errors import TwofoldError
from twofold.nn.layers.factored import FactoredLinear, Form

INSTEAD = "use `twofold export DIR --to dense`, whose output vLLM loads as any model"
LETTERS = {"q": 0, "k": 1, "v": 2}  # vLLM's ids of the shards of a qkv_proj; others are counted


def check_modules(modules: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with a module of another kind than ``FactoredLinear`` with factors of floating point.

    Raises:
        TwofoldError: naming the first such module, and what to do.
    """
    for name, settings in modules.items():
        reason = _reason(name, settings)
        if reason is not None:
            raise TwofoldError(f"the plug-in for vLLM can't hold {name}: {reason}; {INSTEAD}")


def _reason(name: str, settings: Any) -> str | None:
    """Say why vLLM can't hold a module; None if it can."""
    if not isinstance(settings, Mapping):
        return f"its settings in config.json must be a mapping, got {reprlib.repr(settings)}"
    kind, form = stored_kind(settings), settings.get("form", "plain")
    if "bits" in settings or "group" in settings:
        return "its numbers are integers"
    if kind != FactoredLinear.KIND:
        return f"it is stored as a layer of the kind {reprlib.repr(kind)}"
    if form not in FactoredLinear.FORMS:
        return f"its form {reprlib.repr(form)} is none of {', '.join(FactoredLinear.FORMS)}"
    if type(settings.get("rank")) is not int:
        return f"it must have a whole number as its rank, got {reprlib.repr(settings.get('rank'))}"
    if ".experts." in name:
        return "vLLM merges the experts of a block into one weight"
    return None


@dataclass(frozen=True)
class Shard:
    """One projection of the original model, dense or as ``FactoredLinear`` holds it."""

    name: str
    outputs: int  # m
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors in the checkpoint, by their names
    form: Form | Literal["dense"] = "dense"
    rank: int = 0

    @property
    def reads_input(self) -> bool:
        """Whether its right factor is applied to the input as it comes, so that it can be one product with others'."""
        return self.form in ("plain", "rows")


def original_names(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names in the checkpoint of what vLLM calls ``prefix``: one, or several where vLLM merges them.

    Args:
        packed: vLLM's ``packed_modules_mapping`` of the model: the last part of a merged name to those of its parts.
    """
    parent, dot, last = prefix.rpartition(".")
    return [f"{parent}{dot}{part}" for part in packed.get(last, [last])]


def factored_names(prefix: str, packed: Mapping[str, Sequence[str]], modules: Mapping[str, Any]) -> list[str]:
    """Return the names of a layer's shards if at least one of them is factored, else nothing.

    A layer that is merged in the original already (Phi-3's qkv_proj) has one shard.
    """
    if prefix in modules:
        return [prefix]
    names = original_names(prefix, packed)
    return names if any(name in modules for name in names) else []


def shards_of(
    prefix: str, names: Sequence[str], modules: Mapping[str, Mapping[str, Any]], inputs: int, outputs: Sequence[int]
) -> list[Shard]:
    """Return the shards of one layer.

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
        return Shard(name, outputs, {"weight": (outputs, inputs)})
    try:
        form = settings.get("form", "plain")
        layer = FactoredLinear(inputs, outputs, settings["rank"], form, bias=False, device="meta")
    except ValueError as error:
        raise TwofoldError(f"the plan of {name} in the checkpoint does not fit: {error}") from error
    shapes = {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
    del shapes["weight"]  # the guard
    return Shard(name, outputs, shapes, form, layer.rank)


def shard_index(shard_id: Any, shards: Sequence[Shard]) -> int:
    """Return the place of the shard that vLLM's id names: "q", "k", "v", a number, or nothing for a layer of one.

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
