"""Weights that a file holds packed, unpacked one at a time as they are read: numbers of 8 bits with scales, GPTQ, AWQ.

The arithmetic is that of the formats (block scales, arXiv:2412.19437; GPTQ, arXiv:2210.17323; AWQ, arXiv:2306.00978),
so the package that packed them is not needed. What else there is stays with transformers (``model/quantized.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twofold.checkpoint.headers import TensorHeader
from twofold.checkpoint.shards import Shards
from twofold.errors import TwofoldError

FLOAT8 = ("F8_E4M3", "F8_E5M2")
NARROW = {*FLOAT8, "F8_E8M0", "F4", "I8", "U8", "I16", "U16", "I32", "U32"}
SCALES = (
    "weight_scale_inv",
    "weight_scale",
    "scale_weight",
    "scale",
    "SCB",
)  # beside x.weight, whose multiples they are
# Beside x.weight, and of no matter to it: scales of activations and caches, and how bytes are laid out on a device.
BESIDE = (
    "input_scale", "input_scale_ub", "input_zero_point", "scale_input", "activation_scale", "output_scale", "q_scale",
    "k_scale", "v_scale", "weight_format",
)  # fmt: skip
PACKED = (
    ".qweight",
    ".W_q",
    ".weight_packed",
    "_blocks",
    ".weight._data",
    ".weight_qdata",
)  # how packed weights are called
ENDS_BESIDE = (".SCB", ".weight_scale_inv", ".weight_scale", ".absmax")  # and what stands beside them
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each four bits of a word hold
BLOCK = (128, 128)  # of scales, where config.json names none
INT8_LARGEST = 127  # bitsandbytes keeps the largest number of a row as its scale


@dataclass(frozen=True)
class Unpacked:
    """A weight that is read and unpacked when it is asked for, with the questions that transformers asks a slice of a file."""

    make: Callable[[], Tensor]
    dtype: str  # as safetensors names it

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.make()[index]


def is_packed(headers: Mapping[str, TensorHeader]) -> bool:
    """Say whether some weights are no ordinary numbers, by names and dtypes alone."""
    return any(
        header.dtype in FLOAT8 or (header.dtype in NARROW and name.endswith(PACKED)) for name, header in headers.items()
    ) or any(name.endswith(ENDS_BESIDE) for name in headers)


def unpacked_tensors(
    shards: Shards, settings: Mapping[str, Any], strange: Set[str], turned: Set[str]
) -> dict[str, Unpacked] | None:
    """Return every weight of a checkpoint by its ordinary name; None if one is packed in a way that is not known here.

    Floats of 8 bits that have no scales are returned as such.

    Args:
        settings: quantization_config, as far as there is one.
        strange: the tensors that no weight of the model is made of by their names alone.
        turned: the weights that the model holds as (inputs, outputs).

    Raises:
        TwofoldError: naming the first weight whose scales do not belong to it, or are not known here.
    """
    headers, weights = shards.headers, dict[str, Unpacked]()
    used: set[str] = set()
    packed: dict[str, str] = {}  # module → a weight of it that is unpacked here
    for name in headers:
        stem, _, leaf = name.rpartition(".")
        found = None
        if leaf == "qweight":
            found = _integers(shards, stem, settings, turned)
        elif headers[name].dtype in (*FLOAT8, "I8"):
            found = _scaled(shards, name, settings, turned)
        if found is not None:
            target, taken, make = found
            weights[target] = Unpacked(make, "F32")
            used |= taken
            packed[stem] = name
    rest = {name for name in headers.keys() - used if not _is_beside(name)}
    for name in rest:
        header = headers[name]
        if header.dtype in NARROW and len(header.shape) > 1 and (header.dtype not in FLOAT8 or name in strange):
            return None
        weights[name] = Unpacked(partial(_read, shards, name), header.dtype)
    bare = sorted(name for name in rest - strange if headers[name].dtype in FLOAT8)
    _check_scales(headers, bare, packed, sorted(rest & strange), bool(settings))
    return weights


def _is_beside(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return any(leaf == kind or leaf.endswith(f"_{kind}") for kind in BESIDE)


def _check_scales(
    headers: Mapping[str, TensorHeader], bare: list[str], packed: Mapping[str, str], unknown: list[str], named: bool
) -> None:
    """Refuse numbers of 8 bits that something unknown could be a scale of: they would be other weights, without a word.

    Args:
        bare: the weights without scales.
        packed: the modules of all others, with the name of one in each.
        unknown: the tensors that nothing is made of.
        named: whether config.json names a quantization.

    Raises:
        TwofoldError: naming the first such weight, and what stands beside it.
    """
    for key in unknown:
        name = packed.get(key.rpartition(".")[0], bare[0] if bare else None)
        if name is not None:
            raise TwofoldError(
                f"the weight {name} in {headers[name].file} is packed, and {key} may be a scale of it that is not known here; "
                "name the model that it was made from, or take that tensor out of the file if it is none"
            )
    if bare and named:
        raise TwofoldError(
            f"the weight {bare[0]} in {headers[bare[0]].file} is of 8 bits and has no scale, and config.json says that it is "
            "quantized; fetch the checkpoint again, or take quantization_config out if these are the weights themselves"
        )


def _read(shards: Shards, name: str) -> Tensor:
    return next(tensor for _, tensor in shards.read([name]))


Found = tuple[str, set[str], Callable[[], Tensor]]  # the ordinary name, what it is made of, and how


def _scaled(shards: Shards, name: str, settings: Mapping[str, Any], turned: Set[str]) -> Found | None:
    """Find the scales of a weight of 8 bits; None if none is known."""
    headers, (stem, _, leaf) = shards.headers, name.rpartition(".")
    candidates = [f"{name}_scale_inv", f"{name}_scale", *(f"{stem}.{kind}" for kind in SCALES if leaf == "weight")]
    scale = next((key for key in candidates if key in headers), None)
    zero = f"{name}_zero_point"
    if scale is None:
        return None
    spread = partial(_spread, shape=headers[name].shape, block=_block(headers, name, scale, settings))

    def make() -> Tensor:
        numbers, factors = _read(shards, name).float(), _read(shards, scale)
        # Scales of 8 bits are exponents of two.
        factors = (factors.float() - 127).exp2() if factors.dtype == torch.uint8 else factors.float()
        if scale.endswith(".SCB"):
            factors = factors / INT8_LARGEST
        if zero in headers:
            numbers = numbers - spread(_read(shards, zero).float())
        weight = numbers * spread(factors)
        # bitsandbytes packs each weight as (outputs, inputs).
        return weight.T.contiguous() if scale.endswith(".SCB") and name in turned else weight

    return name, {name, scale, zero}, make


def _block(headers: Mapping[str, TensorHeader], name: str, scale: str, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the rows and columns that a scale is for, one for each of the last dimensions of the weight.

    Raises:
        TwofoldError: if there are not as many scales as the weight has blocks.
    """
    shape, grid = headers[name].shape, headers[scale].shape
    if headers[scale].numbers == 1:
        return shape
    if len(grid) == len(shape) - 1 and grid == shape[:-1]:  # one for each row
        return (*(1 for _ in grid), shape[-1])
    named = settings.get("weight_block_size")
    named = named if isinstance(named, list) and all(isinstance(size, int) and size > 0 for size in named) else BLOCK
    if len(grid) == len(shape):
        block = (*(1 for _ in shape[: -len(named)]), *named)
        if [-(-size // length) for size, length in zip(shape, block, strict=True)] == list(grid):  # the last may be cut
            return block
        if all(count and size % count == 0 for size, count in zip(shape, grid, strict=True)):
            return tuple(size // count for size, count in zip(shape, grid, strict=True))
    raise TwofoldError(
        f"the weight {name} in {headers[name].file} has the shape {shape}, and its scales {scale} the shape {grid}, which is not "
        f"that of its blocks of {' × '.join(map(str, named))}; fetch the checkpoint again"
    )


def _spread(grid: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """Repeat each scale over its block; the last blocks may be cut."""
    if grid.numel() == 1:
        return grid.reshape(())
    if grid.dim() == len(shape) - 1:
        return grid.unsqueeze(-1)
    for axis, (size, length) in enumerate(zip(shape, block, strict=True)):
        if length > 1:
            grid = grid.repeat_interleave(length, axis).narrow(axis, 0, size)
    return grid


def _integers(shards: Shards, stem: str, settings: Mapping[str, Any], turned: Set[str]) -> Found | None:
    """Find the parts of a weight of GPTQ or AWQ; None if they are of a layout that is not known here."""
    headers, target = shards.headers, f"{stem}.weight"
    parts = {part: f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx") if f"{stem}.{part}" in headers}
    if not {"qweight", "qzeros", "scales"} <= parts.keys():
        return None
    rows, columns = headers[parts["qweight"]].shape
    groups, outputs = headers[parts["scales"]].shape
    zeros = headers[parts["qzeros"]].shape
    bits = settings.get("bits") or settings.get("w_bit") or 32 * zeros[1] / outputs
    if bits not in (2, 4, 8) or zeros != (groups, outputs * bits // 32):
        return None
    unpack: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    if columns == outputs:
        inputs, unpack = rows * 32 // bits, partial(_gptq, one=settings.get("checkpoint_format") != "gptq_v2")
    elif columns == outputs // 8 and bits == 4:
        inputs, unpack = rows, _awq
    else:
        return None
    if inputs % groups:
        return None

    def make() -> Tensor:
        tensors = {part: _read(shards, key) for part, key in parts.items()}
        group = tensors.pop("g_idx", torch.arange(inputs) // (inputs // groups)).long()
        numbers, middle = unpack(tensors["qweight"], tensors["qzeros"], int(bits))
        weight = (numbers - middle[group]) * tensors["scales"].float()[group]
        return weight if target in turned else weight.T.contiguous()

    return target, set(parts.values()), make


def _gptq(weight: Tensor, zeros: Tensor, bits: int, one: bool) -> tuple[Tensor, Tensor]:
    """Unpack words along the inputs, and zero points, which the first version of the format stores less one."""
    numbers = torch.stack(list(_fields(weight, bits)), 1).flatten(0, 1)
    middle = torch.stack(list(_fields(zeros, bits)), 2).flatten(1)
    return numbers.float(), ((middle + one) & ((1 << bits) - 1) if one else middle).float()


def _awq(weight: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Unpack words along the outputs, whose fields are in another order than their columns."""
    order = sorted(range(len(AWQ_ORDER)), key=AWQ_ORDER.__getitem__)
    numbers, middle = (torch.stack(list(_fields(t, bits)), 2)[..., order].flatten(1).float() for t in (weight, zeros))
    return numbers, middle


def _fields(words: Tensor, bits: int) -> Iterator[Tensor]:
    """Yield the numbers that stand in each word of 32 bits, from the lowest."""
    for shift in range(0, 32, bits):
        yield (words >> shift) & ((1 << bits) - 1)
