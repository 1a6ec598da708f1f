"""An export compared with the model that it was made from: logits, and the tokens of greedy decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pydantic
import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.exports.decoding import Decoder, ModelDecoder, encoder_input, greedy
from twofold.host.faults import models_errors
from twofold.host.quiet import first_line
from twofold.model.blocks import has_two_stacks
from twofold.model.load import LoadedModel, window_limit
from twofold.task.text.special import prompt_ids

TEXTS = (
    "The castle stands above the river, and its people tell of the year when the water rose to",
    "In mathematics, a matrix of low rank is",
    "Once upon a time there was a small town by the sea. Every morning the fishermen went out, and in the evening",
)
LIMIT, HALF_LIMIT = 1e-2, 0.1  # of the relative difference; a broken graph is off by far more
LONGEST = 32  # tokens of a prompt
NONE = (torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0))


class Comparison(pydantic.BaseModel, extra="forbid"):
    """How far the logits of an export are from those of the model that it was made from."""

    positions: int  # that logits were compared at
    largest: float  # the largest difference of two logits
    relative: float  # root mean square of the differences, over that of the logits
    same_best: float  # share of the positions where both say the same token
    tokens: int  # that were decoded greedily after a prompt; 0 if the model does not decode
    equal: int  # of these, how many are the same before the first that differs
    lead: float | None = None  # of the model's best logit over its second one, where they differ


@dataclass(frozen=True)
class Reference:
    """What the model says: its logits for some prompts, and its tokens after the first."""

    prompts: list[Tensor]  # (1, tokens) each
    logits: list[Tensor]  # (1, tokens, vocabulary) each
    tokens: Tensor  # (1, count)
    leads: Tensor  # (1, count)
    pieces: bool  # whether it reads one token after another


def prompts(loaded: LoadedModel) -> list[Tensor]:
    """Return token ids to compare on: short texts, or drawn ones if there is no tokenizer for them."""
    longest = min(window_limit(loaded.model) or LONGEST, LONGEST)
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    asked: list[Tensor] = []
    for number, text in enumerate(TEXTS):
        tokens = [] if loaded.tokenizer is None else prompt_ids(loaded.tokenizer, text)[:longest]
        ids = torch.tensor([tokens], dtype=torch.long)
        if not tokens or max(tokens) >= vocabulary:
            ids = torch.randint(vocabulary, (1, longest), generator=torch.Generator().manual_seed(number))
        asked.append(ids[:, : max(1, longest // (number + 1))])
    return asked


def refer(loaded: LoadedModel, count: int) -> Reference:
    """Record what the model says, for the comparison.

    Raises:
        TwofoldError: if it does not run on inputs that can be drawn, or gives no logits.
    """
    two = has_two_stacks(loaded.model)
    inputs = "token ids or Whisper's log-mel features" if two else "token ids alone"
    why = f"{loaded.name} can't be exported: its logits can't be compared, since it does not run on {inputs}"
    if two and encoder_input(loaded.model) is None:
        raise TwofoldError(f"{why} ({type(loaded.model).__name__} reads {loaded.model.main_input_name})")
    asked = prompts(loaded)
    with models_errors(lambda error: f"{why} ({first_line(error)})"):
        decoder = ModelDecoder(loaded.model)
        logits = []
        for ids in asked:
            decoder.start()
            logits.append(decoder.read(ids).float())
        room = (window_limit(loaded.model) or count + LONGEST) - asked[0].shape[1]
        pieces = bool(loaded.model.can_generate())
        count = max(0, min(count, room)) if pieces else 0
        tokens, leads = greedy(decoder, asked[0], count) if count else NONE
    return Reference(asked, logits, tokens, leads, pieces)


def compare(reference: Reference, decoder: Decoder) -> Comparison:
    """Read the prompts with a decoder, half at once and then one token after another if it goes so, and decode as many."""
    count = same = 0
    largest = wrong = power = 0.0
    for ids, expected in zip(reference.prompts, reference.logits, strict=True):
        decoder.start()
        half = (ids.shape[1] + 1) // 2 if reference.pieces else ids.shape[1]
        pieces = [(0, half), *((place, place + 1) for place in range(half, ids.shape[1]))]
        for begin, end in pieces:
            got = decoder.read(ids[:, begin:end]).float().to(expected.device)
            wanted = expected[:, end - got.shape[1] : end]
            difference = (got - wanted).double()
            count += got.shape[1]
            largest = max(largest, float(difference.abs().max()))
            wrong += float(difference.square().mean(-1).sum())
            power += float(wanted.double().square().mean(-1).sum())
            same += int((got.argmax(-1) == wanted.argmax(-1)).sum())
    tokens = reference.tokens.shape[1]
    equal, lead = tokens, None
    if tokens:
        decoded = greedy(decoder, reference.prompts[0], tokens)[0].to(reference.tokens.device)
        apart = (decoded != reference.tokens)[0].nonzero()
        if len(apart):
            equal = int(apart[0])
            lead = float(reference.leads[0, equal])
    return Comparison(
        positions=count,
        largest=largest,
        relative=(wrong / max(power, 1e-30)) ** 0.5,
        same_best=same / count,
        tokens=tokens,
        equal=equal,
        lead=lead,
    )


def check(comparison: Comparison, dtype: torch.dtype, exact: bool, what: str) -> None:
    """Refuse an export that does not compute what its model does.

    Args:
        exact: whether it should, up to rounding; else it is an approximation that the user asked for.

    Raises:
        TwofoldError: with the difference.
    """
    limit = LIMIT if dtype.itemsize >= 4 else HALF_LIMIT
    if exact and not comparison.relative <= limit:  # NaN is not below it either
        raise TwofoldError(
            f"the logits of the export {what} differ from the model's by {comparison.relative:.1e} (relative), more than "
            f"rounding explains ({limit:.0e}), so it was not kept; use another `to`, and please report it"
        )


def words(comparison: Comparison, dtype: Any) -> list[str]:
    """Tell the comparison in sentences."""
    said = [
        f"Logits: relative difference {comparison.relative:.1e}, at most {comparison.largest:.1e}, "
        f"at {comparison.positions} positions in {str(dtype).removeprefix('torch.')}; "
        f"the same best token at {comparison.same_best:.0%}."
    ]
    if comparison.equal < comparison.tokens:
        said.append(
            f"Greedy decoding: the first {comparison.equal} of {comparison.tokens} tokens are equal; where they part, "
            f"the model's two best logits are {comparison.lead:.1e} apart."
        )
    elif comparison.tokens:
        said.append(f"Greedy decoding: all {comparison.tokens} tokens are equal.")
    return said
