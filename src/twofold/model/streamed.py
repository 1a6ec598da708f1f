"""Where a model's weights are: all in memory, or on disk and in memory for as long as they are needed.

A streamed model is built without weights. ``hold`` reads the weights of some units into it (a unit is a block, the input
embedding or the output head) and drops them at the end; whatever else the model has is small and stays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofold.checkpoint.shards import Shards, check_finite
from twofold.errors import TwofoldError
from twofold.host.clock import return_memory
from twofold.model.blocks import Chain, Stretch, replaced_forward

EMBEDDING, HEAD = "the input embedding", "the output head"
LARGE = 256_000_000  # bytes; a head above this is multiplied in parts from its stored dtype
PART = 16384  # rows of the head that are multiplied at once


class Resident:
    """All weights are in memory."""

    streamed = False

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return next(self.model.parameters()).dtype  # type: ignore[no-any-return]

    @contextmanager
    def hold(self, units: Iterable[str]) -> Iterator[None]:
        """Within the block the weights of these units are in memory."""
        yield

    def keep_apart(self) -> None:
        """Keep memory from growing with the number of blocks, where they come and go."""

    def fused(self, name: str) -> bool:
        """Whether a weight is stored in one tensor with others."""
        return False


M_MMAP_THRESHOLD = -3  # of glibc's mallopt
APART = 2 * 1024**2  # bytes, from which a tensor has memory of its own


class Streamed(Resident):
    """The weights are on disk."""

    streamed = True

    def __init__(
        self,
        model: Any,  # parameters on the meta device, buffers as they were computed
        shards: Shards,
        chain: Chain,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(model)
        self.shards, self.chain = shards, chain
        self._dtype, self._device = dtype, device
        self.state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self.keys: dict[str, str] = {}  # name in the model → name in the checkpoint, stored as it is
        self.unexpected: list[str] = []  # names in the checkpoint that are nothing of this model
        self.converted: dict[str, str] = {}  # name in the checkpoint → unit, for those that transformers converts
        self._map_names()
        self.units: dict[str, list[str]] = {}  # unit → names in the model
        for name in self.state:
            self.units.setdefault(self.unit_of(name), []).append(name)
        self._check()
        for buffer_owner in model.modules():
            for leaf, buffer in buffer_owner._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    buffer_owner._buffers[leaf] = buffer.to(device)
        self._load(self.units.get("", []), "")

    def keep_apart(self) -> None:
        """From here on let each large tensor have memory of its own, which goes back to the system as soon as it is freed.

        glibc begins so, but raises the limit to the size of whatever is freed, up to 32 MB; from then on the tensors of a block
        stand between small things that outlive it, such as its spectra, and their places are not whole any more. It holds for
        the whole process, and costs time where tensors come and go quickly, so not before the calibration is done.
        """
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, APART)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def unit_of(self, name: str) -> str:
        """The unit that a module or weight belongs to; "" for what always stays in memory."""
        block = self.chain.block_of(name)
        if block is not None:
            return self.chain.blocks[block]
        owner = self._owner(name)
        for unit, module in ((EMBEDDING, self.model.get_input_embeddings()), (HEAD, self._head())):
            if module is not None and module is owner:
                return unit
        return ""

    def _owner(self, name: str) -> nn.Module | None:
        """The module that a weight or buffer stands in."""
        try:
            return self.model.get_submodule(name.rpartition(".")[0])  # type: ignore[no-any-return]
        except AttributeError:
            return None

    def _head(self) -> nn.Module | None:
        found = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        return found if isinstance(found, nn.Module) else None

    @property
    def has_head(self) -> bool:
        """Whether the model gives logits over its vocabulary."""
        return HEAD in self.units

    def fused(self, name: str) -> bool:
        return f"{name}.weight" not in self.keys

    def _map_names(self) -> None:
        """Which tensor of the checkpoint is which of the model, by the rules with which transformers loads it."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix = self.model.base_model_prefix
        for key in sorted(self.shards.headers, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self.state)
            if name not in self.state and key in self.state:
                name, pattern = key, None
            if name not in self.state:
                self.unexpected.append(key)
                continue
            if pattern is None:
                self.keys[name] = key
            else:
                self.converted[key] = name

    def _check(self) -> None:
        """Refuse a checkpoint that lacks a weight or has one of another shape."""
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for names in owners.values():  # tied weights are stored once
            stored = next((name for name in names if name in self.keys), None)
            for name in names if stored is not None else []:
                self.keys.setdefault(name, self.keys[stored])  # type: ignore[index]
        made = {self.unit_of(name) for name in self.converted.values()}
        self.converted = {key: self.unit_of(name) for key, name in self.converted.items()}
        missing = [name for name in self.state if name not in self.keys and self.unit_of(name) not in made]
        if missing:
            raise TwofoldError(
                f"the checkpoint {self.shards.folder} is not whole: {len(missing)} weights are missing, "
                f"first {missing[0]}; fetch it again"
            )
        for name, key in self.keys.items():
            found, expected = self.shards.headers[key].shape, tuple(self.state[name].shape)
            if found != expected:
                raise TwofoldError(
                    f"size mismatch: the weight {key} in {self.shards.folder} is {found}, its config.json says "
                    f"{expected}; fetch the checkpoint again"
                )

    def stored_keys(self, unit: str) -> list[str]:
        """The tensors of the checkpoint that belong to a unit, each under the first unit that uses it."""
        own = [self.keys[name] for name in self.units.get(unit, []) if name in self.keys]
        return sorted({*own, *(key for key, owner in self.converted.items() if owner == unit)})

    @contextmanager
    def hold(self, units: Iterable[str]) -> Iterator[None]:
        """Within the block the weights of these units are in memory.

        Raises:
            TwofoldError: if a weight is NaN or infinite, or its file can't be read.
        """
        units = [unit for unit in units if unit in self.units and unit]
        with ExitStack() as stack:
            try:
                for unit in units:
                    self._load(self.units[unit], unit, stack)
                yield
            finally:
                for unit in units:
                    for name in self.units[unit]:
                        self._put(name, self.state[name])
                return_memory()

    def _load(self, names: list[str], unit: str, stack: ExitStack | None = None) -> None:
        keys: dict[str, list[str]] = {}
        for name in names:
            if name in self.keys:
                keys.setdefault(self.keys[name], []).append(name)
        module = {EMBEDDING: self.model.get_input_embeddings, HEAD: self._head}.get(unit, lambda: None)()
        stored = stack is not None and module is not None and self._stays_stored(module, unit)
        for key, tensor in self.shards.read(keys):
            floating = tensor.is_floating_point()
            check_finite(key, tensor, self.shards.folder)
            dtype = self._dtype if floating and not stored else tensor.dtype
            # A copy of its own, so that the file is not kept mapped.
            own = tensor.to(self._device, dtype, copy=True)
            for name in keys[key]:
                self._put(name, own)
        if stored and stack is not None and module is not None:
            function = _lookup if unit == EMBEDDING else _product
            stack.enter_context(replaced_forward(module, function(module, self._dtype)))
        converted = [key for key, owner in self.converted.items() if owner == unit]
        if converted:
            self._convert(converted)

    def _stays_stored(self, module: nn.Module, unit: str) -> bool:
        """Whether a table is large, and stored in fewer bytes than it is computed with."""
        weight = self.state.get(next((name for name in self.units[unit] if name.endswith("weight")), ""))
        if weight is None or type(module) not in (nn.Embedding, nn.Linear):
            return False
        name = next(name for name in self.units[unit] if name.endswith("weight"))
        narrow = name in self.keys and self.shards.headers[self.keys[name]].torch_dtype.itemsize < self._dtype.itemsize
        return narrow and weight.numel() * self._dtype.itemsize > LARGE

    def _convert(self, keys: list[str]) -> None:
        """Load tensors that transformers stores in another layout, such as experts one by one."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        from twofold.host.quiet import quiet_bars

        tensors = dict(self.shards.read(keys))
        for key, tensor in tensors.items():
            check_finite(key, tensor, self.shards.folder)
        settings = LoadStateDictConfig(
            dtype=self._dtype,
            device_map={"": str(self._device)},
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        with quiet_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, settings)
        if info.mismatched_keys or info.conversion_errors:
            first = sorted(map(str, [*info.mismatched_keys, *info.conversion_errors]))[0]
            raise TwofoldError(f"the weight {first} of {self.shards.folder} does not fit the model; fetch it again")
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def _put(self, name: str, tensor: Tensor) -> None:
        module, leaf = self._owner(name), name.rpartition(".")[2]
        assert module is not None
        if leaf in module._parameters:
            module._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
        else:
            module._buffers[leaf] = tensor.data


def _lookup(module: Any, dtype: torch.dtype) -> Any:
    """An embedding that is stored in another dtype than it is computed with."""

    def forward(ids: Tensor) -> Tensor:
        return F.embedding(ids, module.weight, module.padding_idx).to(dtype)

    return forward


class _InParts(torch.autograd.Function):
    """y = Wx with W in its stored dtype, cast some rows at a time; no gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        y = x.new_empty(*x.shape[:-1], len(weight))
        for i in range(0, len(weight), PART):
            y[..., i : i + PART] = x @ weight[i : i + PART].to(x.dtype).T
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        total = None
        for i in range(0, len(weight), PART):
            part = gradient[..., i : i + PART] @ weight[i : i + PART].to(gradient.dtype)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total, None


def _product(module: Any, dtype: torch.dtype) -> Any:
    """A linear layer that is stored in another dtype than it is computed with."""

    def forward(x: Tensor) -> Tensor:
        y: Tensor = _InParts.apply(x, module.weight)  # type: ignore[no-untyped-call]
        return y if module.bias is None else y + module.bias.to(dtype)

    return forward


def units_of(stretch: Stretch, *, head: bool) -> list[str]:
    """The units that a stretch needs."""
    if stretch.chain is None:
        return []
    blocks = list(stretch.chain.blocks[stretch.first : stretch.last])
    return [EMBEDDING] * stretch.is_first + blocks + [HEAD] * (head and stretch.is_last)
