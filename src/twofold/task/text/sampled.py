"""Texts sampled from the model itself, so that no data is needed.

Half of the sequences of a chat model begin with its template's user turn, so that it writes both a request and the answer;
the others, and all those of a plain language model, begin with the beginning-of-text token. All can be asked for of one kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.host.progress import Tick, progress
from twofold.task.output.curvature import draw
from twofold.task.text.special import prompt_ids, text_prefix

MOST_ROWS = 64  # sequences that are sampled together
CACHE_BYTES = 1_500_000_000  # their keys and values take at most this much


def user_turn_prefix(tokenizer: Any) -> str | None:
    """Return what the chat template writes before a user's words; None if the tokenizer has no such template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "\u2063content\u2063"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    except Exception:  # a template may refuse anything; it is data, not ours
        return None
    before, *after = str(text).split(mark, 1)
    return before if after else None


def beginnings(tokenizer: Any, kind: str = "both", size: int | None = None) -> list[list[int]]:
    """Return the token ids that sampled texts begin with, in turn: all of them with those that the tokenizer begins a text with.

    Args:
        size: of the model's vocabulary; a special token beyond it begins no text.
        kind: ``plain``, a text's own beginning; ``chat``, a user's turn of the chat template; ``both``, the first, and the
            second if there is a chat template.

    Raises:
        TwofoldError: if only turns of chat are asked for and there is no template.
    """
    prefix = text_prefix(tokenizer)
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    plain = prefix or [next((id for id in specials if id is not None and (size is None or id < size)), 0)]
    if kind == "plain":
        return [plain]
    chat = user_turn_prefix(tokenizer)
    if chat:
        turn = prompt_ids(tokenizer, chat)
        return [turn] if kind == "chat" else [plain, turn]
    if kind == "chat":
        raise TwofoldError(
            "`self_texts=chat` begins texts with a user's turn, and this tokenizer has no chat template with one; leave it out"
        )
    return [plain]


@torch.no_grad()
def sample_texts(
    model: nn.Module, begin: list[list[int]], *, sequences: int, length: int, seed: int, quiet: bool = False
) -> Tensor:  # (sequences, length), int64
    """Sample token sequences from a language model, at temperature 1, with no truncation of its distribution.

    Args:
        begin: token ids to begin with, in turn (see ``beginnings``).

    Raises:
        TwofoldError: if the model can't generate.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise TwofoldError("this model can't generate text to calibrate on; give it texts with `calibration`")
    generator = torch.Generator().manual_seed(seed)
    starts = [begin[i % len(begin)][:length] for i in range(sequences)]
    rows = _rows(model, length)
    batches = [starts[first : first + rows] for first in range(0, sequences, rows)]
    with progress("Sampling texts from the model", sequences * length, unit="tokens", quiet=quiet) as tick:
        return torch.cat([_continue(model, batch, length, generator, tick) for batch in batches])


def _rows(model: Any, length: int) -> int:
    """Return how many sequences are sampled together: as many as keep the keys and values within ``CACHE_BYTES``."""
    config = model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    element = next(model.parameters()).element_size()
    sequence = 2 * config.num_hidden_layers * heads * width * element * length
    return max(1, min(MOST_ROWS, int(CACHE_BYTES // sequence)))


def _continue(
    model: nn.Module, starts: list[list[int]], length: int, generator: torch.Generator, tick: Tick
) -> Tensor:  # (rows, length)
    """Continue each beginning; a row follows its own beginning as far as it goes, so that all rows run as one batch."""
    device = next(model.parameters()).device
    ids = torch.empty(len(starts), length, dtype=torch.int64)
    given = torch.tensor([len(start) for start in starts])
    for row, start in enumerate(starts):
        ids[row, : len(start)] = torch.tensor(start)
    cache: Any = None
    for position in range(1, length):
        step = ids[:, position - 1 : position].to(device)
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise TwofoldError(
                f"{type(model).__name__} keeps no cache to sample texts with; give it texts with `calibration`"
            )
        drawn = draw(torch.softmax(output.logits[:, -1].float(), -1).cpu(), generator)
        ids[:, position] = torch.where(position < given, ids[:, position], drawn)
        tick(len(ids))
    tick(len(ids))
    return ids
