"""A model written to a folder with all that stands beside its weights, the same in every way that one is written."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load, metadata_save

from twofold.checkpoint.beside import (
    GENERATION,
    MODEL,
    TOKENIZER,
    WHOLE,
    Beside,
    Licence,
    base_licence,
    files_beside,
    read_settings,
)
from twofold.checkpoint.ties import settle_ties
from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line, quiet_bars
from twofold.model.generation import generating_plainly
from twofold.model.load import LoadedModel
from twofold.nn.compact import Compact
from twofold.nn.places import cast_weights


def save_model(model: Any, folder: Path, **settings: Any) -> None:
    """Write the weights and the configurations of a model.

    transformers refuses to write settings of generation that it would not take, or that were changed and are odd; they are no
    matter of ours, so they are written as they are.

    Args:
        settings: more for ``save_pretrained``.
    """
    settle_ties(model)
    with quiet_bars(), generating_plainly(model):
        model.save_pretrained(folder, **settings)
    write_generation(model, folder)


def save_like(loaded: LoadedModel, model: Any, folder: Path) -> None:
    """Write a model that was made of a loaded one, each number in the dtype that it came in; it is cast in place."""
    guards = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Compact)}
    own = {name: dtype for name, dtype in loaded.own_dtypes.items() if name not in guards}
    cast_weights(model, loaded.stored_dtype, own)
    save_model(model, folder)
    if model.config.dtype != loaded.stored_dtype:  # transformers takes that of the first weight
        model.config.dtype = loaded.stored_dtype
        model.config.save_pretrained(folder)


def write_generation(model: Any, folder: Path) -> None:
    """Write how a model generates, if it does."""
    own = getattr(model, "generation_config", None)
    if own is not None and getattr(model, "can_generate", lambda: False)():
        own.to_json_file(folder / GENERATION, use_diff=True, keys_to_pop=["compile_config"])


@dataclass
class Companions:
    """What goes with a result from the folder of its original.

    Attributes:
        licence: of the original, in the fields of a model card.
        notes: what is left out and why.
    """

    loaded: LoadedModel
    kinds: Collection[str] = WHOLE
    beside: Beside | None = None
    licence: Licence = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, loaded: LoadedModel, kinds: Collection[str] = WHOLE) -> Companions:
        """Look at the folder of a model; that of one on the hub is fetched without its weights.

        Args:
            kinds: what the result is to have of it.

        Raises:
            TwofoldError: if the model's configuration can't be written, which would be known only after the work.
        """
        found = cls(loaded, kinds)
        if MODEL in kinds:
            _check_configuration(loaded)
        try:
            folder = loaded.source or (loaded.fetch() if loaded.fetch is not None else None)
        except TwofoldError as error:
            folder = None
            found.notes.append(f"no files were carried along, not even a licence: {error}")
        if folder is not None:
            found.beside = files_beside(folder, kinds)
            found.licence, notes = base_licence(folder)
            found.notes += [*found.beside.notes, *notes]
        lacks = TOKENIZER in kinds and loaded.tokenizer is None and TOKENIZER not in _kinds(found.beside)
        if lacks and getattr(loaded.model, "main_input_name", "") != "pixel_values":  # one of images alone needs none
            found.notes.append(f"no tokenizer was written: {loaded.no_tokenizer or 'the model has none'}")
        return found

    @property
    def record(self) -> dict[str, Any]:
        """The fields of a result's record: which files are carried along, and the licence."""
        return {"carried": sorted(self.beside.carried) if self.beside is not None else [], "licence": self.licence}

    def write(self, folder: Path) -> None:
        """Put them in the folder of the result, whose configuration stands there; a tokenizer without files is written anew."""
        if self.beside is not None:
            self.beside.copy(folder)
        if self.licence:
            self._name_licence(folder / "README.md")
        if self.loaded.tokenizer is None or TOKENIZER not in self.kinds:
            return
        if TOKENIZER not in _kinds(self.beside) or not self._is_known_in(folder):
            self.loaded.tokenizer.save_pretrained(folder)

    def _name_licence(self, card: Path) -> None:
        """Name the licence in the card that the result has; else in one that says nothing more."""
        if not card.exists():
            card.write_text("Made with Twofold; the licence is that of the original model.\n", encoding="utf-8")
        metadata_save(card, {**(metadata_load(card) or {}), **self.licence})

    def _is_known_in(self, folder: Path) -> bool:
        """Say whether the tokenizer's own files give the same tokenizer beside this configuration, or beside none."""
        assert self.beside is not None
        ours, theirs = (
            read_settings(place / "config.json").get("model_type") for place in (folder, self.beside.folder)
        )
        named = str(read_settings(folder / "tokenizer_config.json").get("tokenizer_class")).removesuffix("Fast")
        return ours == theirs or named == type(self.loaded.tokenizer).__name__.removesuffix("Fast")


def _check_configuration(loaded: LoadedModel) -> None:
    """Refuse a configuration that transformers reads and does not write."""
    why = f"the configuration of {loaded.name} can't be written again"
    with (
        tempfile.TemporaryDirectory(prefix="twofold-") as place,
        errors_in_words(lambda error: f"{why} ({first_line(error)}); mend its config.json"),
    ):
        copy.deepcopy(loaded.model.config).save_pretrained(place)


def _kinds(beside: Beside | None) -> Collection[str]:
    return () if beside is None else beside.carried.values()
