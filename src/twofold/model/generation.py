"""How a model generates: by its own generation_config.json, or plainly, whatever that holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers import GenerationConfig

# What a conversation takes from the model beside its special tokens and stop strings: how a token is drawn and chosen.
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
CHOOSING = ("repetition_penalty", "no_repeat_ngram_size", "max_new_tokens")


def plain_generation(model: Any, **settings: Any) -> GenerationConfig:
    """Return settings that take the most likely token each time: only the special tokens are the model's own.

    Args:
        settings: those that differ.
    """
    own = getattr(model, "generation_config", None)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(own, name, None)
        several = given if isinstance(given, list | tuple) else [given]
        ids = [one for one in several if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < vocabulary]
        if ids:
            settings[name] = ids if name == "eos_token_id" and len(ids) > 1 else ids[0]
    if "pad_token_id" not in settings and "eos_token_id" in settings:
        ends = settings["eos_token_id"]
        settings["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return GenerationConfig(**{"do_sample": False, **settings})


def answering_generation(model: Any, **settings: Any) -> GenerationConfig:
    """Return the settings of a conversation: plain ones, with how the model draws tokens and where it ends.

    Args:
        settings: that are given in the place of the model's.
    """
    own = getattr(model, "generation_config", None)
    given = {"do_sample": bool(getattr(own, "do_sample", False)), **settings}
    taken: dict[str, Any] = {}
    for name in (*CHOOSING, *(DRAWING if given["do_sample"] else ())):
        value = getattr(own, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            taken[name] = value
    ends = getattr(own, "stop_strings", None)
    ends = [ends] if isinstance(ends, str) else ends
    if isinstance(ends, list) and all(isinstance(end, str) and end for end in ends):
        taken["stop_strings"] = ends
    with suppress(ValueError, TypeError):
        return plain_generation(model, **(taken | given))
    return plain_generation(model, **given)


@contextmanager
def generating_plainly(model: Any, settings: GenerationConfig | None = None) -> Iterator[GenerationConfig]:
    """Let a model generate by plain settings within the block, or by these, and by nothing of its own.

    ``generate`` fills what its settings leave open from those of the model, so these take their place.
    """
    settings = settings or plain_generation(model)
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = settings
    try:
        yield settings
    finally:
        for module, own in zip(owners, before, strict=True):
            module.generation_config = own


def stored_generation(source: Any, where: dict[str, Any], config: Any) -> tuple[GenerationConfig, bool]:
    """Read how a checkpoint generates as transformers does: from generation_config.json, else from config.json.

    Returns:
        The settings, and whether transformers can't read them itself.
    """
    known = {"revision": where["revision"]}
    broken = False
    for file in ({}, {"config_file_name": "config.json", "_from_model_config": True}):
        try:
            return GenerationConfig.from_pretrained(source, **known, **file), broken
        except OSError:
            continue
        except Exception:  # the file is data, and may hold anything
            broken = True
    return GenerationConfig.from_model_config(config), broken
