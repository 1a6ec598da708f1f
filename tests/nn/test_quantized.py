"""Layers of integers at full rank: the suite of every storage layer."""

from __future__ import annotations

import torch
from conformance import CompactSuite, Drawn, Made

from twofold.nn.int_matrix import IntLinear
from twofold.nn.layers.quantized import QuantizedLinear


class TestQuantized(CompactSuite):
    kind, forms, said = QuantizedLinear, QuantizedLinear.FORMS, ("bits",)

    def make(self, form: str, draw: Drawn) -> Made:
        inner, weight = draw.integers(draw.m, draw.n, IntLinear)
        layer = QuantizedLinear.around(inner, draw.bias, draw.transposed, torch.float64)
        return Made(layer, weight, draw.m * draw.n)
