"""Whose fault an error is, and what of another library's words may stand in a sentence of ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_model
from twofold.cli.words import one_line
from twofold.errors import TwofoldError
from twofold.exports.compare import refer
from twofold.host.quiet import first_line
from twofold.task.causal_lm import CausalLM


class Failing(torch.nn.Module):
    """A model whose code raises an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.device = error, torch.device("cpu")

    def forward(self, **inputs: object) -> None:
        raise self.error


def refer_to(forward):
    """Let a model of this forward be asked by an export, through functions of ours that PyTorch decorates."""
    model = make_model()
    model.forward = forward
    return refer(SimpleNamespace(model=model, tokenizer=None, name="tiny"), 2)


def test_a_model_fails_behind_a_decorated_function_of_ours():
    def fails(**inputs):
        raise ValueError("no pixels")

    with pytest.raises(TwofoldError, match=r"tiny can't be exported: .* \(no pixels\)"):
        refer_to(fails)


def test_a_fault_of_ours_behind_a_decorated_function_stays_one():
    with pytest.raises(AttributeError):
        refer_to(lambda **inputs: SimpleNamespace())


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory: you tried")]
)
def test_too_little_memory_is_not_told_of_the_model(error):
    with pytest.raises(type(error)):
        CausalLM().call(Failing(error), {"input_ids": torch.zeros(1, 3, dtype=torch.long)})


@given(st.text(alphabet="ab_`= \n", max_size=30))
def test_words_of_another_library_make_no_flags(words):
    """Only sentences of ours mark settings."""
    told = one_line(TwofoldError(f"it can't be read ({first_line(ValueError(words))}); give `keep`"))
    assert told.endswith("; give --keep") and told.count("--") == 1
