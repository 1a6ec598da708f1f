"""The baselines: weight-only quantization of the dense model's targets by torchao, measured like every other row.

int8 has one scale for each output, int4 one for each group of 128 or 32 inputs (whichever divides them, else one for each
output); both are symmetric and round to nearest. The weights are quantized as torchao stores them and dequantized when a layer
is called, so that any processor measures them; it tells quality and size, not speed.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from twofold.comparison.grid import BASELINES
from twofold.errors import TwofoldError
from twofold.model.kinds import dense_weight
from twofold.model.target import Target
from twofold.nn.places import put_back, replace_module
from twofold.quantize.rounding import INSTALL, torchao_version

GROUPS = (128, 32)


@dataclass(frozen=True)
class Quantized:
    """What the quantized targets store."""

    replaced: dict[str, nn.Module]  # the dense layers by name
    numbers: int  # of all weights, each of so many bits
    bits: int
    scales: int  # floating-point numbers; the zero points are all zero, and not stored
    note: str

    def bytes(self, element: int) -> int:
        """Return what is stored, scales in numbers of ``element`` bytes."""
        return self.numbers * self.bits // 8 + self.scales * element


def choose_baselines(named: list[str] | None) -> tuple[list[str], str | None]:
    """Return the baselines to measure, and a note if those that nobody named are left out.

    Raises:
        TwofoldError: if some are named, and torchao is not installed.
    """
    if torchao_version() is not None:
        return (list(BASELINES) if named is None else named), None
    if named:
        raise TwofoldError(
            f"the baselines {', '.join(named)} need torchao, which is not installed: {INSTALL}, or leave `baselines` out"
        )
    return [], None if named == [] else f"no quantized baselines: torchao is not installed ({INSTALL})"


@contextmanager
def quantized(model: nn.Module, targets: list[Target], name: str) -> Iterator[Quantized]:
    """Quantize the targets of a model within the block; afterwards it has its dense layers back."""
    bits, scales, kinds = BASELINES[name], 0, Counter[str]()
    dense = {target.name: model.get_submodule(target.name) for target in targets}
    with put_back(model, list(dense)):
        for target in targets:
            layer, group, count = _quantize(dense[target.name], target, bits)
            scales += count
            kinds["one scale for each output" if group is None else f"groups of {group}"] += 1
            replace_module(model, target.name, layer)
        how = ", ".join(f"{kind} in {weights} weights" for kind, weights in kinds.items())
        note = f"{name}: torchao {torchao_version()}, weights alone, symmetric, round to nearest; {how}"
        if bits < 8:
            note += (
                "; on a processor torchao keeps these numbers in a byte each, and the bytes here are of two in a byte"
            )
        yield Quantized(dense, sum(target.size for target in targets), bits, scales, note)


def _quantize(module: nn.Module, target: Target, bits: int) -> tuple[nn.Linear, int | None, int]:
    """Return a linear layer with the quantized weight, its group size (None: a scale for each output), and its scales."""
    ao: Any = importlib.import_module("torchao.quantization")
    weight = dense_weight(module).detach()  # (out, in)
    bias = getattr(module, "bias", None)
    layer = nn.Linear(target.in_features, target.out_features, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    group = None if bits == 8 else next((g for g in GROUPS if target.in_features % g == 0), None)
    granularity = ao.PerAxis(0) if group is None else ao.PerGroup(group)
    dtype = getattr(torch, f"int{bits}")
    ao.quantize_(nn.ModuleList([layer]), ao.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity))
    stored: Any = layer.weight
    return layer, group, int(stored.scale.numel())
