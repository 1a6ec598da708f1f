"""What both models answer to a prompt, for a reader of the report."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import torch
from torch import nn

from twofold.host.quiet import quiet_bars
from twofold.model.load import LoadedModel
from twofold.nn.places import dense_again
from twofold.report.record import Sample
from twofold.task.causal_lm import writes_text

SAMPLE_TOKENS = 32
QUESTION = "What is the capital of France, and why is it famous?"
BEGINNINGS = ("The history of the city begins", "In the morning, the children")


def sample_answers(loaded: LoadedModel, replaced: dict[str, nn.Module]) -> list[Sample]:
    """Greedy answers of both models to two prompts; none if the model does not generate."""
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None or not writes_text(model):
        return []
    prompts = [(text, text) for text in BEGINNINGS]
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": QUESTION}]
        with suppress(Exception):  # a template is data, and may refuse anything
            prompts[0] = (QUESTION, tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    samples = []
    for prompt, text in prompts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
        answers = []
        for context in (dense_again(model, replaced), nullcontext()):
            with context, torch.no_grad(), quiet_bars():
                made = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, do_sample=False
                )
            answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        samples.append(Sample(prompt=prompt, original=answers[0], factored=answers[1]))
    return samples
