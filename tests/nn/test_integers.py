"""Integers of a few bits: packed without gaps, rounded to the nearest, and refused where they are none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.nn.bits import BITS
from twofold.nn.int_matrix import IntLinear, IntMatrix, groups, int_bytes
from twofold.nn.packing import pack, row_bytes, unpack
from twofold.quantize.rounding import round_matrix

sizes = st.integers(1, 70)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), columns=sizes, bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_packed_codes_come_back_in_the_fewest_bytes(rows, columns, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (rows, columns), generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(unpack(packed, columns, bits).long(), codes)
    # Bit by bit, as the format says.
    for i in range(min(columns, 5)):
        found = sum(int(packed[0, (i * bits + b) // 8] >> ((i * bits + b) % 8) & 1) << b for b in range(bits))
        assert found == int(codes[0, i]) - low


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6), columns=sizes, bits=st.sampled_from(BITS), group=st.sampled_from([None, 8, 64]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_number_is_rounded_to_the_nearest_of_its_grid(rows, columns, bits, group, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    made = round_matrix(matrix, bits, group, IntLinear)
    assert (
        sum(b.numel() * b.element_size() for b in made.buffers()) == made.bytes == int_bytes(rows, columns, bits, group)
    )
    scales = made.scales.view(torch.bfloat16).float().repeat_interleave(group or columns, 1)[:, :columns]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    error = (made.weight - matrix).abs()
    # The scale is that of the largest magnitude, so that only what lies beyond the last code is further than half a step.
    assert (error <= scales * 0.5 + 1e-6).logical_or((matrix < low * scales) | (matrix > high * scales)).all()
    assert (error <= scales * 0.5 * 2.1).all()


def test_the_scales_are_absolute_maxima_and_a_short_last_group_has_its_own():
    matrix = torch.zeros(2, 70)
    matrix[:, 3], matrix[:, 66] = torch.tensor([7.5, 3.75]), torch.tensor([-1.5, 15.0])
    made = round_matrix(matrix, 4, 64, IntMatrix)
    assert groups(70, 64) == 2 and row_bytes(70, 4) == 35
    assert torch.equal(
        made.scales.view(torch.bfloat16).float(), torch.tensor([[1.0, 0.2], [0.5, 2.0]]).bfloat16().float()
    )
    assert torch.equal(round_matrix(torch.zeros(3, 9), 4, 64, IntMatrix).weight, torch.zeros(3, 9))


def test_what_does_not_fit_is_refused():
    for bits in (1, 9, "4"):
        with pytest.raises(ValueError, match="bits must be between 2 and 8"):
            IntMatrix(3, 4, bits, None)
    with pytest.raises(ValueError, match="a group must have"):
        IntMatrix(3, 4, 4, 0)
    broken = round_matrix(torch.randn(3, 4), 4, None, IntMatrix)
    broken.scales.view(torch.bfloat16)[1] = float("nan")
    assert "NaN" in broken.index_error()
    broken.codes = broken.codes[:2]
    assert "codes in the checkpoint" in broken.index_error()
