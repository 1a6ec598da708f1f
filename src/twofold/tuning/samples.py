"""What a model answers to some of the held-out prompts, before and after."""

from __future__ import annotations

from itertools import islice
from typing import Any

from twofold.host.clock import return_memory
from twofold.task.text.answers import answer
from twofold.tuning.tokens import IGNORED, Examples

COUNT, TOKENS, LONGEST = 2, 48, 256


def held_out_prompts(examples: Examples) -> list[list[int]]:
    """Return the tokens before the first answer of a few short held-out rows; none of rows that are all answer."""
    rows = ((row, next((i for i, label in enumerate(row.labels) if label != IGNORED), 0)) for row in examples.held_out)
    prompts = (row.input_ids[:start] for row, start in rows if 0 < start <= LONGEST)
    return list(islice(prompts, COUNT))


def answers(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """Return greedy answers."""
    texts = [answer(model, tokenizer, prompt, TOKENS) for prompt in prompts]
    return_memory()
    return texts
