"""What a model answers to a prompt, by plain settings of ours: the most likely token each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twofold.host.quiet import quiet_bars
from twofold.model.frozen import evaluating
from twofold.model.generation import generating_plainly
from twofold.task.text.special import begun, encode, text_prefix


def prompt_ids(tokenizer: Any, prompt: str) -> Tensor:  # (1, length)
    """Return the token ids of a prompt, which begins as the tokenizer begins texts.

    Raises:
        TwofoldError: if the tokenizer fails on it.
    """
    return torch.tensor([begun(encode(tokenizer, prompt), text_prefix(tokenizer))])


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return how a model goes on with a text; the state of the random numbers is not touched.

    Args:
        tokens: of the answer, at the most.
    """
    ids = prompt_ids(tokenizer, prompt).to(model.device)
    with evaluating(model), quiet_bars(), generating_plainly(model) as settings:
        settings.max_new_tokens = tokens
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
