"""Integers of a few bits: packed without gaps, with scales that no cast changes, and layers made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.nn.bits import BITS
from twofold.nn.int_matrix import IntLinear, IntMatrix, groups, int_bytes
from twofold.nn.layers.corrected import CorrectedLinear
from twofold.nn.layers.embedding import QuantizedEmbedding
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.quantized import QuantizedLinear
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


def test_no_cast_of_a_model_changes_the_numbers():
    layer = QuantizedLinear.around(round_matrix(torch.randn(6, 40), 4, 64, IntLinear), torch.randn(6))
    before = layer.to_dense(torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        layer = layer.to(dtype)
        assert torch.equal(layer.to_dense(torch.float64), before)
        assert layer(torch.randn(2, 40, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_integers_compute_what_their_dense_weight_does(bias):
    torch.manual_seed(0)
    b = torch.randn(6) if bias else None
    inner = round_matrix(torch.randn(6, 40), 3, 8, IntLinear)
    for layer in (
        QuantizedLinear.around(inner, b),
        CorrectedLinear.correct(inner, torch.randn(6, 2), torch.randn(2, 40), b),
    ):
        x = torch.randn(3, 40, requires_grad=True)
        y = layer(x)
        expected = x @ layer.to_dense().T + (0 if b is None else b)
        torch.testing.assert_close(y, expected)
        gradient = torch.autograd.grad(y.sum(), x)[0]
        torch.testing.assert_close(gradient, layer.to_dense().sum(0).expand(3, -1))
        assert layer.weight.shape == (1,)


def test_an_embedding_of_integers_looks_up_rows_of_its_matrix():
    weight = torch.randn(11, 20)
    table = round_matrix(weight, 8, None, IntMatrix)
    layer = QuantizedEmbedding(11, 20, 8, None)
    layer.table = table
    ids = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(layer(ids), table.weight[ids])
    assert torch.equal(layer.dense()(ids), layer(ids))
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    for bits in (1, 9, "4"):
        with pytest.raises(ValueError, match="bits must be between 2 and 8"):
            IntMatrix(3, 4, bits, None)
    with pytest.raises(ValueError, match="a group must have"):
        IntMatrix(3, 4, 4, 0)
    with pytest.raises(ValueError, match="rank of a correction"):
        CorrectedLinear(8, 6, 4, None, rank=7)
    layer = FactoredLinear(8, 6, 2)
    with pytest.raises(ValueError, match=r"reduce must be \(2, 8\)"):
        layer.hold_integers(4, None, reduce=IntLinear(3, 8, 4, None))
    broken = round_matrix(torch.randn(3, 4), 4, None, IntMatrix)
    broken.scales.view(torch.bfloat16)[1] = float("nan")
    assert "NaN" in broken.index_error()
    broken.codes = broken.codes[:2]
    assert "codes in the checkpoint" in broken.index_error()
