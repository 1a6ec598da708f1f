"""Special tokens, as tokenizer and model have them and never by name: which begin a text, which ends one, which pads."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line
from twofold.model.load import vocabulary_size

MOST_UNKNOWN = 0.5  # of a text's tokens; more of them, and it is not the text that is learnt from
PROBES = ("a", "The", "1", "\u3002")  # short texts, of which any tokenizer knows one


def encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Return the token ids of a text.

    Args:
        special: with those that the tokenizer puts around each text.

    Raises:
        TwofoldError: if the tokenizer fails on it.
    """
    with errors_in_words(
        lambda error: (
            f"the tokenizer can't encode a text ({first_line(error)}); put the files that are the model's beside it"
        )
    ):
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def check_known(tokenizer: Any, ids: list[int], what: str) -> None:
    """Refuse a text that is mostly unknown to a tokenizer.

    Raises:
        TwofoldError: naming it.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = ids.count(unknown) / len(ids) if ids and unknown is not None else 0.0
    if share > MOST_UNKNOWN:
        raise TwofoldError(
            f"{share:.0%} of {what} is unknown to the tokenizer, which has {tokenizer.unk_token} in its place; give a text that "
            "it can encode, or the tokenizer that the model was trained with"
        )


def text_prefix(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts before each text, such as that of <bos>; what it puts behind one does not count."""
    for probe in PROBES:
        plain = encode(tokenizer, probe)
        if plain:
            whole = encode(tokenizer, probe, special=True)
            places = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
            return whole[: places[0]] if places else []
    return []


def begun(ids: Iterable[int], prefix: list[int]) -> list[int]:
    """Return the ids of a text that begins with a prefix once: it is put before them where they do not begin with it."""
    ids = list(ids)
    while prefix and ids[: len(prefix)] == prefix:  # a chat template writes it, too
        ids = ids[len(prefix) :]
    return [*prefix, *ids]


def prompt_ids(tokenizer: Any, text: str, *, rendered: bool = False) -> list[int]:
    """Return the token ids of a text that a model is to go on with.

    It begins as the tokenizer begins texts, once, and ends as it stands: what the tokenizer puts behind a text would end it.

    Args:
        rendered: by a chat template, which writes what it begins with itself.

    Raises:
        TwofoldError: if the tokenizer fails on it.
    """
    ids = encode(tokenizer, text)
    return ids if rendered else begun(ids, text_prefix(tokenizer))


def ended(ids: list[int], end: int | None) -> list[int]:
    """Return the ids of a text that ends with an end token once, if there is one."""
    if end is None:
        return ids
    kept = len(ids)
    while kept and ids[kept - 1] == end:  # the text holds it, and the tokenizer may put another behind
        kept -= 1
    return [*ids[:kept], end]


def in_words(tokenizer: Any, ids: list[int]) -> str:
    """Return special tokens as they are written."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(ids))) if ids else ""


def cut_windows(ids: list[int], window: int, prefix: list[int]) -> Tensor:  # (windows, window), int64
    """Cut the tokens of a text into windows, each with the prefix before its part of them; what is left over fills none.

    A window whose part of the text begins with the prefix itself has it once.

    Raises:
        TwofoldError: if the prefix leaves no room in a window for text that is predicted.
    """
    room = window - len(prefix)
    if room < 1:
        raise TwofoldError(
            f"`window={window}` has no room for text: the tokenizer begins each with {len(prefix)} special tokens; use at least "
            f"`window={len(prefix) + 1}`, or windows without them by `bos=none`"
        )
    rows: list[list[int]] = []
    place = 0
    while True:
        while prefix and ids[place : place + len(prefix)] == prefix:
            place += len(prefix)
        if len(ids) - place < room:
            return torch.tensor(rows, dtype=torch.int64).view(len(rows), window)
        rows.append([*prefix, *ids[place : place + room]])
        place += room


def end_id(tokenizer: Any, model: Any) -> int | None:
    """Return the id that ends a text: the tokenizer's, or else the first that the model stops at; None if none can be used."""
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = [getattr(tokenizer, "eos_token_id", None), *(stops if isinstance(stops, list) else [stops])]
    return _first_known(named, tokenizer, model)


def pad_id(tokenizer: Any, model: Any) -> int:
    """Return the id to pad with: the tokenizer's, or else that of the end, or the first of all. What is padded is masked."""
    named = chain(
        (getattr(tokenizer, "pad_token_id", None), end_id(tokenizer, model)), range(vocabulary_size(model) or 0)
    )
    return _first_known(named, tokenizer, model) or 0


def _first_known(ids: Iterable[int | None], tokenizer: Any, model: Any) -> int | None:
    """Return the first id that the model has a row for, and the tokenizer, if there is one, a word."""
    size = vocabulary_size(model)

    def known(token: int) -> bool:
        inside = token >= 0 and (size is None or token < size)
        return inside and (tokenizer is None or tokenizer.convert_ids_to_tokens(token) is not None)

    return next((token for token in ids if token is not None and known(token)), None)
