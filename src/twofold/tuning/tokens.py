"""Rows to token ids, and to labels that are the answers alone; what is too long is refused, cut or skipped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import torch

from twofold.errors import TwofoldError
from twofold.task.text.chat import RefusedRowError, Shown, common, has_template, no_template, render, show
from twofold.task.text.row import Row, Tally, Turn
from twofold.task.text.special import begun, ended, text_prefix
from twofold.task.text.special import encode as encode_text

IGNORED = -100  # the label of a token that is not learnt


@dataclass(frozen=True)
class Example:
    """The token ids of a row, and its labels: the id where it is learnt, −100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    unshown: tuple[str, ...] = ()  # fields of its turns that the chat template does not show
    otherwise: int = (
        0  # answers that are not learnt, since the chat template renders them otherwise before further turns
    )

    @property
    def learnt(self) -> int:
        """Count the tokens that the loss is over; the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Examples:
    """Examples to train on and held-out ones, and what became of long rows."""

    train: list[Example]
    held_out: list[Example]
    cut: int = 0
    left_out: int = 0

    @property
    def sha256(self) -> str:
        """Return the hash of all that is trained on and measured on, in its order."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for example in part:
                digest.update(json.dumps([example.input_ids, example.labels]).encode())
            digest.update(b"|")
        return digest.hexdigest()


def encode_rows(
    rows: list[Row],
    tokenizer: Any,
    *,
    length: int,
    long: Literal["refuse", "cut", "skip"] = "refuse",
    loss: Literal["answers", "all"] = "answers",
    skip_bad: bool = False,
    held_out: float = 0.1,
    seed: int = 0,
    tally: Tally | None = None,
) -> Examples:
    """Return the tokens and labels of all rows, some of which are set aside to measure on.

    Args:
        tally: counts what is left out.

    Raises:
        TwofoldError: if rows are longer than ``length`` and are to be refused; if a row can't be put through the chat template,
            unless such rows are to be skipped; or if too few rows are left.
    """
    examples: list[Example] = []
    prefix = text_prefix(tokenizer)
    cut = left_out = 0
    too_long: list[tuple[str, int]] = []
    tally = Tally() if tally is None else tally
    for row in rows:
        try:
            example = encode(row, tokenizer, loss=loss, prefix=prefix)
        except RefusedRowError as error:
            tally.refuse(str(error), skip=skip_bad)
            continue
        tally.unshown.update(example.unshown)
        tally.otherwise += example.otherwise
        size = len(example.input_ids)
        if size > length:
            too_long.append((row.where, size))
            shorter = Example(example.input_ids[:length], example.labels[:length])
            if long == "skip" or not shorter.learnt:  # of a prompt alone nothing is learnt
                left_out += 1
                continue
            cut += 1
            example = shorter
        examples.append(example)
    if too_long and long == "refuse":
        where, size = too_long[0]
        longest = max(size for _, size in too_long)
        raise TwofoldError(
            f"{where} has {size} tokens, more than the {length} of `length`, and so have {len(too_long) - 1} more rows (the "
            f"longest {longest}); raise `length`, cut such rows with `long=cut`, or leave them out with `long=skip`"
        )
    if tally.skipped and not examples:
        raise TwofoldError(
            f"no row is left to learn from: {tally.skipped} bad ones were skipped, first {tally.first_skipped}"
        )
    train, aside = _split(examples, held_out, seed)
    return Examples(train, aside, cut, left_out)


def _split(examples: list[Example], held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    count = int(held_out) if held_out >= 1 or not held_out else max(round(held_out * len(examples)), 1)
    if len(examples) <= count:
        raise TwofoldError(
            f"of {len(examples)} rows that can be used {count} would be held out, and none is left to train on; "
            "use a smaller `held_out`, or more data"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]


def encode(
    row: Row, tokenizer: Any, *, loss: Literal["answers", "all"] = "answers", prefix: list[int] | None = None
) -> Example:
    """Return one row as tokens and labels.

    Args:
        prefix: what the tokenizer begins a text with, where it is known.

    Raises:
        TwofoldError: if the tokenizer has no chat template, one that does not begin a conversation as it goes on, or one that
            refuses the row.
    """
    if row.turns:
        example = _conversation(row, tokenizer, whole=loss == "all")
    else:
        prefix = text_prefix(tokenizer) if prefix is None else prefix
        example = _completion(row, tokenizer, prefix, whole=loss == "all")
    if not example.learnt:
        raise RefusedRowError(f"{row.where}: nothing of it is learnt, its answer has no tokens")
    return example


def _completion(row: Row, tokenizer: Any, prefix: list[int], *, whole: bool) -> Example:
    """Return the tokens of a prompt and its completion as they stand, with the one that ends a text.

    What the tokenizer begins and ends a text with stands there once, also where the row holds it already.
    """
    text = encode_text(tokenizer, row.prompt + row.completion, special=True)
    ids = ended(begun(text, prefix), getattr(tokenizer, "eos_token_id", None))
    if whole or not row.prompt:
        return Example(ids, ids)
    prompt = begun(encode_text(tokenizer, row.prompt), prefix)
    start = common(prompt, ids)  # a token may reach over the border
    return Example(ids, [IGNORED] * start + ids[start:])


def _conversation(row: Row, tokenizer: Any, *, whole: bool) -> Example:
    """Return the tokens of a conversation by the chat template.

    Learnt are the assistant's turns, with what ends them. They are found by rendering the conversation up to each answer: as the
    model sees it before it answers. An answer that is rendered otherwise before further turns is not learnt.
    """
    if not has_template(tokenizer):
        raise no_template(row)
    shown = show(row, tokenizer)
    ids = encode_text(tokenizer, shown.text)
    labels = [*ids] if whole else [IGNORED] * len(ids)
    marked = [number for number, turn in enumerate(row.turns) if _is_learnt(turn, whole=whole) != whole]
    told = [number for number in marked if whole or number not in shown.partly]
    spans = [span for number in told if (span := _span(shown, ids, tokenizer, number))]
    if (marked and not spans) or (whole and len(spans) < len(marked)):  # what has the weight 0 must be told
        raise RefusedRowError(
            f"{row.where}: the chat template renders the beginning of a conversation otherwise than the whole, so the "
            "answers in it can't be told; learn all of it with `loss=all`, or give one answer a row"
        )
    for start, stop in spans:
        labels[start:stop] = [IGNORED] * (stop - start) if whole else ids[start:stop]
    return Example(ids, labels, shown.unshown, len(marked) - len(spans))


def _span(shown: Shown, ids: list[int], tokenizer: Any, number: int) -> tuple[int, int] | None:
    """Return where the tokens of a turn begin and end in those of its conversation; None if they can't be told."""
    row, turn = shown.row, shown.row.turns[number]
    asked = render(row, tokenizer, number, ask=turn.role == "assistant")
    after = shown.text if number + 1 == len(row.turns) else render(row, tokenizer, number + 1)
    start, stop = (_shared(encode_text(tokenizer, text), ids) for text in (asked, after))
    if stop is not None and start is None:  # it asks for reasoning (<think>) that this answer does not begin with
        before = render(row, tokenizer, number)
        content = shown.text.rfind(turn.content.strip() or shown.text, len(before), len(after))
        before += shown.text[len(before) : min(common(asked, shown.text), max(content, len(before)))]
        start = _shared(encode_text(tokenizer, before), ids)
    return None if start is None or stop is None or stop <= start else (start, stop)


def _shared(beginning: list[int], ids: list[int]) -> int | None:
    """Return the length of a beginning as it is shared, but for a token that may reach over its end; None if it is another."""
    shared = common(beginning, ids)
    return None if shared < len(beginning) - 1 else shared


def _is_learnt(turn: Turn, *, whole: bool) -> bool:
    return turn.learnt and (whole or turn.role == "assistant")
