"""Where a model's weights are: all in memory, or on disk and in memory for as long as they are needed.

A streamed model is built without weights. ``hold`` reads the weights of some units into it (a unit is a block, the input
embedding or the output head) and drops them at the end; whatever else the model has is small and stays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twofold.checkpoint.loaded import check_missing, check_shape
from twofold.checkpoint.shards import Shards, check_finite_tensor
from twofold.checkpoint.ties import tied_names
from twofold.errors import TwofoldError
from twofold.host.clock import return_memory
from twofold.model.blocks import Chain, Stretch, replaced_forward
from twofold.model.head import output_layer
from twofold.model.stored import Stored
from twofold.model.weights import parameter_names

EMBEDDING, HEAD = "the input embedding", "the output head"
LARGE = 256_000_000  # bytes; a head above this is multiplied in parts from its stored dtype
PART = 16384  # rows of the head that are multiplied at once


class Resident:
    """A model whose weights are all in memory.

    Args:
        dtype, device: of the computation, where the model's first weight does not show them.
    """

    streamed = False

    def __init__(self, model: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self.model = model
        self._dtype, self._device = dtype, device

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self._device or next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self._dtype or next(self.model.parameters()).dtype  # type: ignore[no-any-return]

    @contextmanager
    def hold(self, units: Iterable[str]) -> Iterator[None]:
        """Keep the weights of these units in memory within the block."""
        yield

    def keep_apart(self) -> None:
        """Keep memory from growing with the number of blocks, where they come and go."""

    def fused(self, name: str) -> bool:
        """Say whether a weight is stored in one tensor with others."""
        return False


M_MMAP_THRESHOLD = -3  # of glibc's mallopt
APART = 2 * 1024**2  # bytes, from which a tensor has memory of its own


class Streamed(Resident):
    """A model whose weights are on disk: its parameters are on the meta device, its buffers as they were computed."""

    streamed = True

    def __init__(
        self, model: Any, shards: Shards, stored: Stored, chain: Chain, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(model, dtype, device)
        self.shards, self.chain = shards, chain
        self.tables: dict[str, Any] = {EMBEDDING: model.get_input_embeddings(), HEAD: output_layer(model)}
        self.state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self.keys = stored.keys  # name in the model → name in the checkpoint, stored as it is
        # name in the checkpoint → unit, for those that transformers converts
        self.converted = {key: self.unit_of(name) for key, name in stored.converted.items()}
        self.units: dict[str, list[str]] = {}  # unit → names in the model
        always = {id(tensor) for name, tensor in self.state.items() if not self.unit_of(name)}
        for name, tensor in self.state.items():
            unit = "" if id(tensor) in always else self.unit_of(name)  # tied to a weight that stays in memory
            self.units.setdefault(unit, []).append(name)
        self._check()
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(device)
        self._load("", ExitStack())

    def keep_apart(self) -> None:
        """Let each large tensor from here on have memory of its own, which goes back to the system as soon as it is freed.

        glibc begins so, but raises the limit to the size of whatever is freed, up to 32 MB; from then on the tensors of a block
        stand between small things that outlive it, such as its spectra, and their places are not whole any more. It holds for
        the whole process, and costs time where tensors come and go quickly, so not before the calibration is done.
        """
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, APART)

    def unit_of(self, name: str) -> str:
        """Return the unit that a module or weight belongs to; "" for what always stays in memory."""
        block = self.chain.block_of(name)
        if block is not None:
            return self.chain.blocks[block]
        owner = self._owner(name)
        return next((unit for unit, table in self.tables.items() if table is not None and table is owner), "")

    def _owner(self, name: str) -> nn.Module | None:
        """Return the module that a weight or buffer stands in."""
        try:
            return self.model.get_submodule(name.rpartition(".")[0])  # type: ignore[no-any-return]
        except AttributeError:
            return None

    @property
    def has_head(self) -> bool:
        """Whether the model gives logits over its vocabulary."""
        return HEAD in self.units

    def fused(self, name: str) -> bool:
        return f"{name}.weight" not in self.keys

    def _check(self) -> None:
        """Refuse a checkpoint that lacks a weight or has one of another shape."""
        for names in parameter_names(self.model).values():  # tied weights are stored once
            key = next((self.keys[name] for name in names if name in self.keys), None)
            if key is not None:
                self.keys |= {name: self.keys.get(name, key) for name in names}
        converted = set(self.converted.values())
        missing = [name for name in self.state if name not in self.keys and self.unit_of(name) not in converted]
        check_missing(sorted(missing), place=self.shards.folder)
        for name, key in self.keys.items():
            shape, expected = self.shards.headers[key].shape, tuple(self.state[name].shape)
            check_shape(f"the weight {key}", self.shards.folder, shape, expected)

    def stored_keys(self, unit: str) -> list[str]:
        """Return the tensors of the checkpoint that belong to a unit, each under the first unit that uses it."""
        own = [self.keys[name] for name in self.units.get(unit, []) if name in self.keys]
        return sorted({*own, *(key for key, owner in self.converted.items() if owner == unit)})

    @cached_property
    def written(self) -> dict[str, str]:
        """The names that transformers writes tensors of the checkpoint under, where it puts the base model's prefix before them.

        Others it renames or converts when it reads them, and back when it writes.
        """
        ties, prefix = tied_names(self.model), f"{self.model.base_model_prefix}."
        names: dict[str, list[str]] = {}
        for name, key in self.keys.items():
            names.setdefault(key, []).append(name)
        return {
            key: next((name for name in same if name not in ties), same[0])
            for key, same in names.items()
            if any(key in (name, name.removeprefix(prefix), prefix + name) for name in same)
        }

    @contextmanager
    def hold(self, units: Iterable[str]) -> Iterator[None]:
        """Keep the weights of these units in memory within the block.

        Raises:
            TwofoldError: if a weight is NaN or infinite, or its file can't be read.
        """
        units = [unit for unit in units if unit in self.units and unit]
        with ExitStack() as stack:
            try:
                for unit in units:
                    self._load(unit, stack)
                yield
            finally:
                for unit in units:
                    for name in self.units[unit]:
                        self._put(name, self.state[name])
                return_memory()

    def _load(self, unit: str, stack: ExitStack) -> None:
        """Read the weights of a unit; a table that stays in its stored dtype computes by parts while the stack is open."""
        keys: dict[str, list[str]] = {}
        for name in self.units.get(unit, []):
            if name in self.keys:
                keys.setdefault(self.keys[name], []).append(name)
        stays_stored = self._stays_stored(unit)
        for key, tensor in self.shards.read(keys):
            check_finite_tensor(key, tensor, self.shards.folder)
            dtype = self.dtype if tensor.is_floating_point() and not stays_stored else tensor.dtype
            # A copy of its own, so that the file is not kept mapped; weights that are tied stay one.
            own = tensor.to(self.device, dtype, copy=True)
            if own.is_floating_point():
                own = nn.Parameter(own, requires_grad=False)
            for name in keys[key]:
                self._put(name, own)
        if stays_stored:
            table = self.tables[unit]
            stack.enter_context(replaced_forward(table, _cast_forward(table, self.dtype)))
        converted = [key for key, owner in self.converted.items() if owner == unit]
        if converted:
            self._convert(converted)

    def _stays_stored(self, unit: str) -> bool:
        """Say whether a unit is a large table, stored in fewer bytes than it is computed with."""
        if type(self.tables.get(unit)) not in (nn.Embedding, nn.Linear):
            return False
        name = next((name for name in self.units[unit] if name.endswith("weight")), "")
        wide = self.dtype.itemsize
        narrow = name in self.keys and self.shards.headers[self.keys[name]].torch_dtype.itemsize < wide
        return narrow and self.state[name].numel() * wide > LARGE

    def _convert(self, keys: list[str]) -> None:
        """Load tensors that transformers stores in another layout, such as experts one by one."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        from twofold.host.quiet import quiet_bars

        tensors = dict(self.shards.read(keys))
        for key, tensor in tensors.items():
            check_finite_tensor(key, tensor, self.shards.folder)
        settings = LoadStateDictConfig(
            dtype=self.dtype, device_map={"": str(self.device)}, weight_mapping=get_model_conversion_mapping(self.model)
        )
        with quiet_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, settings)
        if info.mismatched_keys or info.conversion_errors:
            first = min(map(str, [*info.mismatched_keys, *info.conversion_errors]))
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


def _cast_forward(table: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the forward of an embedding or a linear layer that is stored in another dtype than it is computed in."""

    def lookup(ids: Tensor) -> Tensor:
        return F.embedding(ids, table.weight, table.padding_idx).to(dtype)

    def product(x: Tensor) -> Tensor:
        y: Tensor = _InParts.apply(x, table.weight)  # type: ignore[no-untyped-call]
        return y if table.bias is None else y + table.bias.to(dtype)

    return lookup if isinstance(table, nn.Embedding) else product


class _InParts(torch.autograd.Function):
    """The product y = Wx with W in its stored dtype, cast some rows at a time; no gradient of W."""

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
        parts = zip(torch.split(gradient, PART, -1), torch.split(weight, PART), strict=True)
        return reduce(Tensor.add_, (g @ rows.to(g.dtype) for g, rows in parts)), None


def units_of(stretch: Stretch, *, head: bool) -> list[str]:
    """Return the units that a stretch needs."""
    if stretch.chain is None:
        return []
    blocks = list(stretch.chain.blocks[stretch.first : stretch.last])
    return [EMBEDDING] * stretch.is_first + blocks + [HEAD] * (head and stretch.is_last)
