"""A conversation in the terminal, or with lines from a pipe; each answer is shown as it is made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress

import torch

from twofold.errors import TwofoldError
from twofold.host.quiet import first_line
from twofold.model.generation import answering_generation, generating_plainly
from twofold.model.load import LoadedModel, check_ids, load_model, need_tokenizer, window_limit
from twofold.task.causal_lm import need_writer
from twofold.task.text.special import prompt_ids

HELP = "Write a line. /clear forgets what was said, /exit or Ctrl-D ends."


class Conversation:
    """What was said so far, and how a model goes on with it.

    A model without a chat template goes on with the text itself, that of all lines and answers.

    Args:
        system: what the model is told before everything else.
        max_tokens: of an answer.
        temperature: 0 takes the most likely token each time.

    Raises:
        TwofoldError: if the model does not answer, or its chat template knows no ``system``.
    """

    def __init__(self, loaded: LoadedModel, system: str | None, max_tokens: int, temperature: float) -> None:
        self.loaded, self.tokenizer = loaded, need_tokenizer(loaded)
        need_writer(loaded.model, loaded.name, "so it can't answer")
        self.templated = getattr(self.tokenizer, "chat_template", None) is not None
        if system is not None and not self.templated:
            raise TwofoldError(f"{loaded.name} has no chat template, so it can't be told a `system`; leave it out")
        self.opening = [] if system is None else [{"role": "system", "content": system}]
        self.max_tokens, self.temperature = max_tokens, temperature
        self.longest = window_limit(loaded.model)
        self.clear()
        if self.opening:
            self._ids([{"role": "user", "content": "Hi"}])

    def clear(self) -> None:
        """Forget what was said."""
        self.turns: list[dict[str, str]] = []

    def answer(self, line: str) -> tuple[str, bool]:
        """Answer a line, writing the answer to standard output; both are remembered.

        Returns:
            The answer, and whether the oldest turns had to be forgotten for it.

        Raises:
            TwofoldError: if the line alone is longer than the context.
        """
        turns = [*self.turns, {"role": "user", "content": line}]
        ids, forgot = self._ids(turns), False
        while self.longest is not None and ids.shape[1] >= self.longest:
            if len(turns) == 1:
                raise TwofoldError(
                    f"the line is {ids.shape[1]} tokens long with what stands before it, and the model's context "
                    f"{self.longest}, with no room for an answer; write less"
                )
            turns, forgot = turns[2:], True
            ids = self._ids(turns)
        text = self._generate(ids)
        self.turns = [*turns, {"role": "assistant", "content": text}]
        return text, forgot

    def _ids(self, turns: list[dict[str, str]]) -> torch.Tensor:  # (1, tokens)
        if self.templated:
            try:
                encoded = self.tokenizer.apply_chat_template(
                    [*self.opening, *turns], add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except Exception as error:  # a template is data, and may refuse anything
                rest = "; leave `system` out" if self.opening else ""
                raise TwofoldError(
                    f"the chat template of {self.loaded.name} refuses the conversation ({first_line(error)}){rest}"
                ) from error
        else:
            text = "".join(turn["content"] for turn in turns)
            encoded = {"input_ids": torch.tensor([prompt_ids(self.tokenizer, text)], dtype=torch.int64)}
        ids: torch.Tensor = encoded["input_ids"].to(self.loaded.model.device)
        if not ids.numel():
            raise TwofoldError(
                f"the tokenizer of {self.loaded.name} makes no token of what was written; write other words"
            )
        check_ids(ids, self.loaded)
        return ids

    def _generate(self, ids: torch.Tensor) -> str:
        from transformers import TextStreamer

        room = self.max_tokens if self.longest is None else min(self.max_tokens, self.longest - ids.shape[1])
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        shown = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = answering_generation(self.loaded.model, max_new_tokens=room, **drawn)
        with generating_plainly(self.loaded.model, settings):
            out = self.loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=shown,
                generation_config=settings,
                tokenizer=self.tokenizer,
            )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def chat(
    model: str,
    *,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Talk until the input ends. Lines of a pipe are turns of one conversation; only the answers go to standard output.

    Raises:
        TwofoldError: if the model can't be loaded or does not answer, or a line of a pipe is longer than its context.
    """
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    conversation = Conversation(loaded, system, max_tokens, temperature)
    torch.manual_seed(seed)
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        print(HELP, file=sys.stderr)
    if not conversation.templated:
        print(f"{loaded.name} has no chat template: it goes on with the text that you write.", file=sys.stderr)
    for line in _lines(terminal):
        if line in ("/exit", "/quit"):
            break
        if line == "/clear":
            conversation.clear()
            continue
        try:
            _, forgot = conversation.answer(line)
            if forgot:
                print("(the oldest turns were forgotten: the context is full)", file=sys.stderr)
        except TwofoldError as error:
            if not terminal:
                raise
            print(error, file=sys.stderr)


def _lines(terminal: bool) -> Iterator[str]:
    """Yield the lines that are written, without empty ones."""
    with suppress(EOFError):
        for line in iter(lambda: input("> "), None) if terminal else sys.stdin or ():
            if line.strip():
                yield line.strip()
