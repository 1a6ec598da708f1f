"""transformers' serving handlers for one model that is loaded already, with the checks that an answer needs before it begins."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from twofold.errors import TwofoldError
from twofold.host.quiet import first_line
from twofold.model.load import LoadedModel, check_ids, window_limit

SEED = "twofold_seed"  # of a request, in its generation config on the way to the thread that draws
REAL = (int, float)
LIMITS = {  # of numbers in a request: their types, the least one, the largest one, and what they are in words
    "max_tokens": ((int,), 1, math.inf, "a whole number above 0"),
    "max_completion_tokens": ((int,), 1, math.inf, "a whole number above 0"),
    "temperature": (REAL, 0.0, sys.float_info.max, "a number that is not below 0"),
    "top_p": (REAL, 0.0, 1.0, "a number between 0 and 1"),
    "frequency_penalty": (REAL, math.nextafter(-1.0, 0.0), sys.float_info.max, "a number above -1"),
    "seed": ((int,), -(2**63), 2**63 - 1, "a whole number of 64 bits"),
}
FIXED_ARGUMENTS = (  # of the chat template, which the server gives
    "add_generation_prompt", "chat_template", "conversation", "load_audio_from_video", "return_dict", "return_tensors", "self",
    "tokenize", "tools",
)  # fmt: skip


class OneModel(ModelManager):  # type: ignore[misc]
    """The models of a server: this one, under its name."""

    def __init__(self, loaded: LoadedModel, name: str) -> None:
        self.loaded, self.name = loaded, name
        super().__init__(device=str(loaded.model.device), dtype="auto")

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.loaded.model, self.loaded.tokenizer

    async def load_model_streaming(self, *_: Any, **__: Any) -> AsyncIterator[str]:
        yield f'data: {{"status": "ready", "model": "{self.name}", "cached": true}}\n\n'

    def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "twofold"}]

    def shutdown(self) -> None:
        """Do nothing: the model was not loaded here."""


class Answers(GenerateManager):  # type: ignore[misc]
    """Answers one request after another, each as ``generate`` does alone, so that none depends on what else is asked.

    Args:
        longest: tokens of the model's context, None if it has no limit.
    """

    def __init__(self, loaded: LoadedModel, longest: int | None) -> None:
        super().__init__()
        self.loaded, self.longest = loaded, longest

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **more: Any) -> Any:
        self._prepare(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        self._prepare(inputs, gen_config)
        left = threading.Event()

        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), left.is_set(), device=ids.device)

        def run() -> Any:
            if left.is_set():
                return inputs["input_ids"]
            return model.generate(**inputs, generation_config=gen_config, tokenizer=processor, stopping_criteria=[stop])

        try:
            sequences = await asyncio.shield(self.async_submit(run))
        except asyncio.CancelledError:  # the client has left
            left.set()
            raise
        length = inputs["input_ids"].shape[-1]
        generated = sequences[0, length:]
        return processor.decode(generated, skip_special_tokens=True), length, generated

    def _prepare(self, inputs: Any, gen_config: Any) -> None:
        """Refuse a prompt without room for an answer, end the answer where the context ends, and set its seed."""
        length = int(inputs["input_ids"].shape[-1])
        if length == 0:
            raise HTTPException(400, "the prompt is empty; write something")
        try:
            check_ids(inputs["input_ids"], self.loaded)
        except TwofoldError as error:
            raise HTTPException(400, str(error)) from error
        if self.longest is not None:
            room = self.longest - length
            if room <= 0:
                context = f"the prompt has {length} tokens and the model's context {self.longest}"
                raise HTTPException(400, f"{context}, with no room for an answer; shorten it")
            gen_config.max_new_tokens = min(gen_config.max_new_tokens or room, room)
        seed = gen_config.__dict__.pop(SEED, None)
        if seed is not None:  # on the thread that draws, right before this answer: nothing comes between the two
            self.submit(torch.manual_seed, seed)


class State(GenerationState):  # type: ignore[misc]
    """One manager, for the one model."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self._answers = Answers(loaded, window_limit(loaded.model))

    def get_manager(self, model_id: str, use_cb: bool = False) -> Answers:
        return self._answers


class _Checked:
    """What both handlers check beside transformers' own checks."""

    model_manager: OneModel

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        name, asked = self.model_manager.name, body.get("model")
        if asked not in (None, "", name):
            raise HTTPException(404, f"this server has the model {name}, not {asked}; ask for {name}")
        return name, self.model_manager.loaded.model, self.model_manager.loaded.tokenizer

    def _check_numbers(self, body: dict[str, Any]) -> None:
        for key, (types, least, most, words) in LIMITS.items():
            value = body.get(key)
            if value is not None and (type(value) not in types or not least <= value <= most):
                raise HTTPException(400, f"{key} must be {words}, got {value!r}")
        if body.get("n") not in (None, 1):
            raise HTTPException(400, "n must be 1: this server gives one answer to a request")
        if body.get("generation_config") is not None:
            raise HTTPException(
                400, "generation_config is not taken; use max_tokens, temperature, top_p, stop and seed"
            )

    def _build_generation_config(self, body: dict[str, Any], *given: Any, **more: Any) -> Any:
        # transformers would set the seed here, while another answer is drawn
        config = super()._build_generation_config({**body, "seed": None}, *given, **more)  # type: ignore[misc]
        setattr(config, SEED, body.get("seed"))
        if body.get("temperature"):
            config.do_sample = True
        return config


class Chat(_Checked, ChatCompletionHandler):  # type: ignore[misc]
    """POST /v1/chat/completions."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        self._check_numbers(body)
        messages = body.get("messages")
        if not (isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)):
            raise HTTPException(400, "messages must be a list of {role, content}, with at least one")
        model, tokenizer = self.model_manager.loaded.model, self.model_manager.loaded.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise HTTPException(400, f"{self.model_manager.name} has no chat template; use /v1/completions")
        if body.get("chat_template_kwargs", {}) is None:
            del body["chat_template_kwargs"]
        arguments = body.get("chat_template_kwargs", {})
        if not isinstance(arguments, dict):
            raise HTTPException(400, "chat_template_kwargs must be an object")
        if fixed := [key for key in FIXED_ARGUMENTS if key in arguments]:
            raise HTTPException(400, f"chat_template_kwargs can't set {fixed[0]}; leave it out")
        try:  # before the answer begins
            modality = self.model_manager.get_model_modality(model, processor=tokenizer)
            turns = self.get_processor_inputs_from_messages(messages, modality)
            tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tools=body.get("tools"), tokenize=False, **arguments
            )
        except Exception as error:  # a template is data, and may refuse anything
            raise HTTPException(400, f"the chat template refuses the conversation ({first_line(error)})") from error
        return await super().handle_request(body, request_id)


class Complete(_Checked, CompletionHandler):  # type: ignore[misc]
    """POST /v1/completions."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        self._check_numbers(body)
        if not isinstance(body.get("prompt"), str):
            raise HTTPException(400, "prompt must be a text")
        return await super().handle_request(body, request_id)
