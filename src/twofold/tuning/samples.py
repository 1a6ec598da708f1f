"""What a model answers to some of the held-out prompts, before and after."""

from __future__ import annotations

from typing import Any

import torch

from twofold.host.clock import return_memory
from twofold.host.quiet import quiet_bars
from twofold.tuning.tokens import IGNORED, Examples

COUNT, TOKENS, LONGEST = 2, 48, 256


def held_out_prompts(examples: Examples, tokenizer: Any) -> list[str]:
    """The texts before the first answer of a few short held-out rows; none of rows that are all answer."""
    prompts = []
    for one in examples.held_out:
        start = next((i for i, label in enumerate(one.labels) if label != IGNORED), 0)
        if 0 < start <= LONGEST:
            prompts.append(tokenizer.decode(one.input_ids[:start]))
        if len(prompts) == COUNT:
            break
    return prompts


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers; the state of the random numbers is not touched."""
    given = []
    training = model.training
    model.eval()
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
        with quiet_bars():
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        given.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    model.train(training)
    return_memory()
    return given
