"""Samples of any kind, one made of each record, and the tasks that have such: what a task adds is how a record is encoded."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, ClassVar

import torch

from twofold.errors import TwofoldError
from twofold.host.progress import progress
from twofold.settings.base import Settings
from twofold.task import LABELS, Batch, Data, S, Samples, Task
from twofold.task.data.columns import Kind, Record
from twofold.task.data.example import example_of
from twofold.task.data.records import given_records, made_of, read_records
from twofold.task.data.settings import Columns, Records
from twofold.task.text.row import Tally
from twofold.task.text.settings import Measuring, Texts


@dataclass(frozen=True)
class Example:
    """One sample: the arguments of the model's forward, what is predicted of it, and what its record says beside."""

    batch: Batch  # of one sample
    predictions: int = 1
    about: Any = None  # what is right in words, for the task's own measure

    @property
    def shape(self) -> tuple[Any, ...]:
        """Samples of one shape can stand in one batch."""
        return tuple((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in sorted(self.batch.items()))


@dataclass(frozen=True)
class Examples(Samples):
    """Samples that are encoded one by one. A batch holds those of one shape that follow one another."""

    examples: tuple[Example, ...]
    source: str
    unit: str  # type: ignore[misc]  # of the task
    begin: str = ""

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, first: int, last: int) -> Batch:
        batches = [example.batch for example in self.examples[first:last]]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def take(self, places: Sequence[int]) -> Examples:
        return replace(self, examples=tuple(self.examples[i] for i in places))

    def __add__(self, others: Examples) -> Examples:
        return replace(self, examples=self.examples + others.examples)

    def units(self, first: int, last: int) -> int:
        return last - first

    def spans(self, size: int) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for i, example in enumerate(self.examples):
            first = spans[-1][0] if spans else 0
            if spans and i - first < size and example.shape == self.examples[first].shape:
                spans[-1] = (first, i + 1)
            else:
                spans.append((i, i + 1))
        return spans

    def alike(self, size: int = 32) -> Iterator[tuple[list[int], Batch]]:
        """Yield batches of samples of one shape, wherever they stand, with their places."""
        places: dict[tuple[Any, ...], list[int]] = {}
        for i, example in enumerate(self.examples):
            places.setdefault(example.shape, []).append(i)
        for same in places.values():
            for first in range(0, len(same), size):
                some = same[first : first + size]
                yield some, self.take(some).batch(0, len(some))

    @property
    def predictions(self) -> int:
        return sum(example.predictions for example in self.examples)

    @property
    def shape(self) -> list[int]:
        return [len(self), self.predictions]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr(example.shape).encode())
            for _, tensor in sorted(example.batch.items()):
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def set_aside(examples: Examples, count: int, aside: int, notes: tuple[str, ...], each: int = 1) -> Data:
    """Part samples into those to calibrate on, those of one shape together, and the last ones, which are set aside.

    Args:
        count: how many were asked for to calibrate on.
        aside: how many more; where there are none, a tenth of all.
    """
    spare = max(min(aside, len(examples) - count), 0)
    if aside and not spare and len(examples) > 1:
        spare = min(aside, max(1, len(examples) // 10))
    calibrated = len(examples) - spare
    order = sorted(range(calibrated), key=lambda i: (examples.examples[i].shape, i))
    return Data(examples.take(order), examples[calibrated:], count, notes, each)


class ExampleTask(Task):
    """A task whose samples are made of records."""

    settings = Texts
    reads: ClassVar[Kind] = "text"  # what a file of a folder holds: audio, image or text
    unit: ClassVar[str]  # of samples, in words: "clips"
    each: ClassVar[int] = 8  # samples that are set aside for each window that a text would have set aside

    def kind_of(self, loaded: Any) -> Kind:
        """Return what a file of a folder holds for a model."""
        return self.reads

    def fitted(self, settings: S, loaded: Any, *, quiet: bool = False) -> S:
        for name in ("tokens", "window", "continuations", "self_texts", "bos", "chat"):
            if settings.chosen(name):
                raise TwofoldError(f"`{name}` is for windows of text, and {self.name} reads {self.unit}; leave it out")
        batch = type(settings).model_fields.get("refine_batch")
        if batch is None or "refine_batch" in settings.model_fields_set:
            return settings
        # A sample has a prediction or some, where a window has hundreds: a step of so few would be scatter.
        return settings.model_copy(update={"refine_batch": batch.default * self.each})

    @abstractmethod
    def encode(self, record: Record, loaded: Any) -> Iterable[Example]:
        """Return the samples of a record, by the processor of a model.

        Args:
            loaded: a twofold.model.load.LoadedModel.

        Raises:
            BadRowError: if the record can't be used.
            TwofoldError: if the model has no processor.
        """

    def data(
        self,
        loaded: Any,
        settings: Settings,
        hashed: str,
        given: Iterable[Any] | None = None,
        *,
        held_out: int,
        quiet: bool = False,
    ) -> Data:
        count, names = settings.part(Records).samples, settings.part(Texts).calibration
        if given is None and names == ["self"]:
            raise TwofoldError(
                f"{self.name} needs {self.unit} to calibrate on: name a folder, files or a data set with `calibration`, or use "
                "an objective that needs none (`objective=svd`)"
            )
        tally, aside, loaded.hashed = Tally(), held_out * self.each, hashed
        how = settings.part(Columns)
        records = (
            self._records(names, loaded, settings, tally)
            if given is None
            else given_records(given, settings.part(Columns), kind=self.kind_of(loaded), tally=tally)
        )
        source = (
            "given samples" if given is not None else ", ".join(name.rstrip("/").rpartition("/")[2] for name in names)
        )
        examples = self._encoded(records, loaded, count + aside, tally, source, skip_bad=how.skip_bad, quiet=quiet)
        tally.tell()
        return set_aside(examples, count, aside, tuple(tally.sentences), self.each)

    def measured(self, loaded: Any, settings: Settings) -> Samples | None:
        texts = settings.part(Measuring)
        if texts.eval_text is None or texts.eval_windows == 0:
            return None
        return self.samples_of([texts.eval_text], loaded, settings, texts.eval_windows * self.each)

    def samples_of(
        self, names: Sequence[str], loaded: Any, settings: Settings, count: int | None, *, quiet: bool = True
    ) -> Examples:
        """Read the samples of some files, folders or data sets.

        Args:
            count: how many at the most; None for all.

        Raises:
            TwofoldError: if there are none that can be used.
        """
        tally = Tally()
        records = self._records(names, loaded, settings, tally)
        source = ", ".join(name.rstrip("/").rpartition("/")[2] for name in names)
        skip = settings.part(Columns).skip_bad
        examples = self._encoded(records, loaded, count, tally, source, skip_bad=skip, quiet=quiet)
        tally.tell()
        return examples

    def _records(self, names: Sequence[str], loaded: Any, settings: Settings, tally: Tally) -> Iterator[Record]:
        return read_records(names, settings.part(Columns), kind=self.kind_of(loaded), tally=tally)

    def _encoded(
        self,
        records: Iterable[Record],
        loaded: Any,
        count: int | None,
        tally: Tally,
        source: str,
        *,
        skip_bad: bool,
        quiet: bool,
    ) -> Examples:
        """Encode records, up to so many samples; those that can't be used are refused, or left out and counted.

        Raises:
            TwofoldError: naming the first record that can't be used, or if there is none.
        """

        with progress("Reading", count or 0, unit=self.unit, quiet=quiet) as tick:

            def encode(record: Record) -> list[Example]:
                made = list(self.encode(record, loaded))
                tick(len(made))
                return made

            made = made_of(records, encode, tally=tally, skip_bad=skip_bad)
            found = tuple(islice(chain.from_iterable(made), count))
        if not found:
            left = f", and {tally.skipped} could not be read" if tally.skipped else ""
            raise TwofoldError(f"there are no {self.unit} in {source}{left}; name others")
        return Examples(found, source, self.unit)

    def example(self, model: Any) -> Batch:
        return example_of(model)


def labelled(labels: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is right for each prediction of a sample, as a part of its batch."""
    return {LABELS: torch.as_tensor(labels, dtype=torch.int64).reshape(1, -1)}
