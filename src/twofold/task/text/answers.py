"""What a model answers to a prompt, by plain settings of ours: the most likely token each time."""

from __future__ import annotations

from typing import Any

import torch

from twofold.host.quiet import quiet_bars
from twofold.model.frozen import evaluating
from twofold.model.generation import generating_plainly


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: list[int], tokens: int) -> str:
    """Return how a model goes on with a text; the state of the random numbers is not touched.

    Args:
        prompt: its token ids.
        tokens: of the answer, at the most.
    """
    ids = torch.tensor([prompt], device=model.device)
    with evaluating(model), quiet_bars(), generating_plainly(model) as settings:
        settings.max_new_tokens = tokens
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
