"""What the weight files hold, by the names of the model: which tensor is which weight, in which dtype, and what is left over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from twofold.checkpoint.headers import DTYPES, TensorHeader
from twofold.checkpoint.recognize import check_names
from twofold.checkpoint.shards import Shards
from twofold.errors import TwofoldError

LAYER = re.compile(r"\.\d+\.")
# Some architectures make a part of their weights anew, so a model may have more numbers than its checkpoint, but not many more.
SLACK, LARGER = 100_000_000, 4
BY_RULE = "the model's class leaves it out by a rule of its own"
COMPUTED = "computed anew when the model is made"


@dataclass
class Stored:
    """The tensors of a checkpoint's files, each a weight of the model or left over with a reason."""

    headers: Mapping[str, TensorHeader] = field(default_factory=dict)  # by names in the files
    keys: dict[str, str] = field(default_factory=dict)  # name in the model → name in the files, stored as it is
    converted: dict[str, str] = field(default_factory=dict)  # name in the files → in the model, in another layout there
    unused: dict[str, str] = field(default_factory=dict)  # name in the files → why no weight of the model is made of it
    parted: list[str] = field(
        default_factory=list
    )  # names in the model of weights that are tied there, and not in the files
    notes: list[str] = field(default_factory=list)  # how the files differ from what config.json says

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of most of the model's numbers; None if no file says."""
        numbers: Counter[torch.dtype] = Counter()
        for key in {*self.keys.values(), *self.converted}:
            dtype = DTYPES.get(self.headers[key].dtype)
            if dtype is not None and dtype.is_floating_point:
                numbers[dtype] += self.headers[key].numbers
        return numbers.most_common(1)[0][0] if numbers else None

    @property
    def own_dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the weights, by their names in the model, that are stored in another one than most."""
        most = self.dtype
        dtypes = {name: DTYPES.get(self.headers[key].dtype) for name, key in self.keys.items()}
        return {n: d for n, d in dtypes.items() if d is not None and d.is_floating_point and d != most}

    @property
    def unused_notes(self) -> list[str]:
        """What is left over, a sentence for each reason."""
        by_reason: dict[str, list[str]] = {}
        for key, reason in sorted(self.unused.items()):
            by_reason.setdefault(reason, []).append(key)
        return [
            f"the files hold {f'{len(keys)} tensors that are' if len(keys) > 1 else 'a tensor that is'} not in the result, "
            f"{'first ' if len(keys) > 1 else ''}{keys[0]}: {reason}"
            for reason, keys in by_reason.items()
        ]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the files; empty where they are not on this disk."""
        return self.headers[key].shape if key in self.headers else ()


def find_stored(model: Any, shards: Shards | None, unexpected: Iterable[str] = ()) -> Stored:
    """Find which tensor of the files is which weight of a model, by the rules by which transformers loads it.

    Args:
        model: with or without its weights, as config.json describes it.
        shards: None for files that are not looked into.
        unexpected: what transformers found left over in such files, when it loaded them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    if shards is None:
        return Stored(unused={key: _why_unused(model, key) for key in unexpected})
    stored = Stored(shards.headers)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = dict(model.state_dict(keep_vars=True))
    for key in sorted(shards.headers, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            stored.unused[key] = _why_unused(model, name)
        elif pattern is None:
            stored.keys[name] = key
        else:
            stored.converted[key] = name
    return stored


def _why_unused(model: Any, name: str) -> str:
    """Say why a model has no place for a tensor of its files."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, name) for pattern in patterns):
        return BY_RULE
    buffers = {leaf.rpartition(".")[2] for leaf, _ in model.named_buffers()}
    if name.rpartition(".")[2] in buffers:
        return COMPUTED
    return f"{type(model).__name__} has no place for it"


def check_wrapped(stored: Stored, model: Any) -> None:
    """Refuse tensors whose names something that was around the model has changed.

    Raises:
        TwofoldError: naming what changed them.
    """
    missing = model.state_dict().keys() - stored.keys.keys() - set(stored.converted.values())
    check_names(stored.unused.keys(), missing, f"{getattr(model, 'base_model_prefix', '')}.")


def check_fit(stored: Stored, model: Any, name: str) -> None:
    """Refuse tensors that do not fit an empty model, so that a wrong configuration can't ask for absurd amounts of memory.

    A weight may be stored turned, so a tensor is compared by its count of numbers; the exact shapes are checked when they are
    loaded.

    Args:
        model: made from the configuration, on the meta device.

    Raises:
        TwofoldError: naming the first tensor of another size or kind, or of a layer that the model does not have; what has
            changed the names of all of them; or both sizes, if the model is far larger.
    """
    state = model.state_dict()
    check_wrapped(stored, model)
    for key, own in stored.keys.items():
        tensor, header = state[key], stored.headers[own]
        if header.numbers != tensor.numel():
            raise TwofoldError(
                f"the weight {key} in {header.file} has the shape {header.shape}, its config.json says {tuple(tensor.shape)}; "
                "fetch the checkpoint again"
            )
        if tensor.is_floating_point() != header.dtype.startswith(("F", "BF")):
            needed = "a floating-point type" if tensor.is_floating_point() else "integers"
            raise TwofoldError(
                f"the weight {key} in {header.file} is of type {header.dtype}, the model needs {needed}; "
                "fetch the checkpoint again"
            )
    check_depth_of_files(stored, state, name)
    described = sum(parameter.numel() for parameter in model.parameters())
    held = sum(header.numbers for header in stored.headers.values())
    if described > LARGER * held + SLACK:
        raise TwofoldError(
            f"the config.json of {name} describes a model of {described:,} numbers, its weight files hold {held:,}; "
            "fetch the checkpoint again"
        )


def check_depth_of_files(stored: Stored, names: Iterable[str], name: str) -> None:
    """Refuse to drop layers that the files have and config.json does not; other leftover weights do no harm.

    Args:
        names: of the model's weights.

    Raises:
        TwofoldError: naming the first weight.
    """
    known = {LAYER.sub(".#.", key) for key in names}
    left = [key for key, reason in stored.unused.items() if reason != BY_RULE]
    dropped = sorted(key for key in left if LAYER.search(key) and LAYER.sub(".#.", key) in known)
    if dropped:
        raise TwofoldError(
            f"the checkpoint {name} has more layers than its config.json says, first {dropped[0]}; fetch it again"
        )
