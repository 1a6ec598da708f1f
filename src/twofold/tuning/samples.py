"""What a model answers to some of the held-out prompts, before and after."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from twofold.host.clock import return_memory
from twofold.host.quiet import quiet_bars
from twofold.model.frozen import evaluating
from twofold.tuning.tokens import IGNORED, Examples

COUNT, TOKENS, LONGEST = 2, 48, 256


def held_out_prompts(examples: Examples, tokenizer: Any) -> list[str]:
    """Return the texts before the first answer of a few short held-out rows; none of rows that are all answer."""
    rows = ((row, next((i for i, label in enumerate(row.labels) if label != IGNORED), 0)) for row in examples.held_out)
    prompts = (tokenizer.decode(row.input_ids[:start]) for row, start in rows if 0 < start <= LONGEST)
    return list(islice(prompts, COUNT))


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Return greedy answers; the state of the random numbers is not touched."""
    texts = []
    with evaluating(model), quiet_bars():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
            mask = torch.ones_like(ids)
            tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
            texts.append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    return_memory()
    return texts
