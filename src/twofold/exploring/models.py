"""The original and one of its sizes, loaded when they are first asked; they run one at a time."""

from __future__ import annotations

import threading
from typing import Any

import torch

from twofold.errors import TwofoldError
from twofold.exploring.reading import compare_readings
from twofold.exploring.sizes import Size
from twofold.host.faults import is_out_of_memory
from twofold.host.quiet import first_line
from twofold.model.load import LoadedModel, check_ids, load_model, need_tokenizer, window_limit
from twofold.model.tokenizer import OWN_CODE
from twofold.report.messages import ENGLISH
from twofold.task.causal_lm import CausalLM, need_writer
from twofold.task.text.answers import answer
from twofold.task.text.special import prompt_ids

ANSWER = 40  # tokens of an answer
LONGEST = 512  # tokens of a text: the logits of both models are held


class RefusedError(Exception):
    """What was asked can't be done, in words of messages.json.

    Args:
        key: of the words.
        values: what is put into them.
    """

    def __init__(self, key: str, **values: Any) -> None:
        super().__init__(ENGLISH.say(key, **values))
        self.key, self.values = key, values


class Models:
    """The original, and the size that was asked last.

    No code that comes with a checkpoint is run.

    Args:
        original: its name.
        how: what both are loaded with: ``dtype`` and ``device``.
        only: settings for the original alone.
    """

    def __init__(self, sizes: list[Size], original: str, how: dict[str, Any], only: dict[str, Any]) -> None:
        self.sizes = {size.name: size for size in sizes}
        self.original, self.how, self.only = original, how, only
        self.lock = threading.Lock()
        self.dense: LoadedModel | None = None
        self.factored: tuple[str, LoadedModel] | None = None

    def read(self, size: str, text: str, chat: bool) -> dict[str, Any]:
        """Let both models read a text; see ``compare_readings``.

        Args:
            chat: whether the text is a question, put through the chat template, and not a text to go on with.

        Raises:
            RefusedError: if the text is empty or too long, or a model can't be loaded or run.
        """
        with self.lock:
            models, ids = self._prepare(size, text, chat)
            said = [_predictions(loaded, ids) for loaded in models]
            widths = [values.shape[-1] for values in said]
            if widths[0] != widths[1]:
                raise RefusedError("served.other", original=self.original, tokens=widths[0], own=widths[1])
            return compare_readings(ids, said[0], said[1], models[1].tokenizer)

    def answer(self, size: str, text: str, chat: bool) -> dict[str, str]:
        """Return how both models go on, by the most likely token each time.

        Raises:
            RefusedError: as ``read`` does.
        """
        with self.lock:
            models, ids = self._prepare(size, text, chat)
            said = [answer(loaded.model, models[1].tokenizer, ids, ANSWER) for loaded in models]
        return {"dense": said[0], "factored": said[1]}

    def _prepare(self, size: str, text: str, chat: bool) -> tuple[tuple[LoadedModel, LoadedModel], list[int]]:
        """Return both models, and the text as token ids."""
        if size not in self.sizes:
            raise RefusedError("served.size", size=size)
        if not text.strip():
            raise RefusedError("served.empty")
        try:
            models = self._load(size)
            ids = _encode(models[1].tokenizer, text, chat)
            most = min([LONGEST, *(limit - ANSWER for m in models if (limit := window_limit(m.model)) is not None)])
            if len(ids) > most:
                raise RefusedError("served.long", tokens=len(ids), most=most)
            if not ids:
                raise RefusedError("served.empty")
            for loaded in models:
                check_ids(torch.tensor(ids), loaded)
        except TwofoldError as error:
            if str(error).endswith(OWN_CODE):
                raise RefusedError("served.code", name=self.original) from error
            raise RefusedError("served.failed", why=first_line(error)) from error
        except Exception as error:
            if is_out_of_memory(error):
                raise RefusedError("served.memory") from error
            raise
        return models, ids

    def _load(self, size: str) -> tuple[LoadedModel, LoadedModel]:
        if self.dense is None:
            dense = load_model(self.original, **self.how, **self.only)
            need_writer(dense.model, self.original, "so there is no next token to compare")
            self.dense = dense
        if self.factored is None or self.factored[0] != size:
            self.factored = None  # gives its memory back before the next one is loaded
            factored = load_model(str(self.sizes[size].folder), **self.how)
            need_tokenizer(factored)
            self.factored = size, factored
        return self.dense, self.factored[1]


@torch.no_grad()
def _predictions(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:  # (tokens, vocabulary), log-probabilities
    """Run a model over a text."""
    try:
        logits = CausalLM().outputs(loaded.model, {"input_ids": torch.tensor([ids])})
    except TwofoldError as error:
        raise RefusedError("served.failed", why=first_line(error)) from error
    values = torch.log_softmax(logits.float(), -1)
    if bool(values.isnan().any()):
        raise RefusedError("served.numbers", name=loaded.name)
    return values


def _encode(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Return the token ids of a text to go on with, or of a question in a chat."""
    if not chat:
        return prompt_ids(tokenizer, text)
    turn = [{"role": "user", "content": text}]
    try:
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is data, and may refuse anything
        raise RefusedError("served.template", why=first_line(error)) from error
    return prompt_ids(tokenizer, str(rendered), rendered=True)
