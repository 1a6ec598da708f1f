"""A matrix to integers by torchao: it chooses the scales and rounds to nearest; symmetric, so that every zero point is zero.

torchao keeps what it quantizes as tensors of its own. Those of four bits that a processor computes with take a byte a number, and
those that are packed need an accelerator's kernels, so neither these tensors nor torchao's safetensors helpers would store the
bytes that are counted, or load on any machine. So only the rounding is torchao's; packing and storing are ``IntMatrix``'s, and a
checkpoint is loaded without torchao.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.errors import TwofoldError
from twofold.host.quiet import silence
from twofold.nn.int_matrix import IntMatrix

INSTALL = "pip install 'twofold[quantize]'"
SMALLEST = 1e-30  # of a scale: a group of zeros has one, too

Kind = TypeVar("Kind", bound=IntMatrix)


def torchao_version() -> str | None:
    """Return the version of torchao; None if it is not installed."""
    return importlib.metadata.version("torchao") if importlib.util.find_spec("torchao") is not None else None


def need_torchao(setting: str, value: str) -> None:
    """Refuse what needs torchao, before any work.

    Raises:
        TwofoldError: if it is not installed.
    """
    if torchao_version() is None:
        raise TwofoldError(
            f"`{setting}={value}` needs torchao, which is not installed: {INSTALL}, or leave `{setting}` out"
        )


@torch.no_grad()
def round_matrix(
    matrix: Tensor,  # (rows, columns)
    bits: int,
    group: int | None,
    kind: type[Kind],
) -> Kind:
    """Return the integers nearest to a matrix, with scales of bfloat16 that are rounded before the numbers are.

    Args:
        group: inputs that share a scale; the last group of a row may be shorter. None: one scale a row.
    """
    with silence():
        ao: Any = importlib.import_module("torchao.quantization")
    rows, columns = matrix.shape
    wide = matrix.detach().float()
    width = max(group or columns, 2)  # torchao takes no block of one number
    wide = F.pad(wide, (0, -columns % width))  # zeros change no scale, since those come from the largest magnitude
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    block = (1, width)
    scales, zeros = ao.choose_qparams_affine(
        wide, ao.MappingType.SYMMETRIC, block, target_dtype=torch.int8, quant_min=low, quant_max=high, eps=SMALLEST,
        scale_dtype=torch.bfloat16, zero_point_dtype=torch.int8, keepdim=True,
    )  # fmt: skip
    codes = ao.quantize_affine(wide, block, scales.float(), zeros, torch.int8, low, high)[:, :columns]
    return kind.of(codes, scales.reshape(rows, -1), bits, group)
