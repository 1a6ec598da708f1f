"""What a model is for: the tasks by name, one file each. A task knows its samples, and what the model makes of them means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import Field
from typing_extensions import Self

from twofold.errors import TwofoldError
from twofold.registry import Registry
from twofold.settings.base import Settings
from twofold.task.output import Output

if TYPE_CHECKING:
    from torch import Tensor

# Arguments of the model's forward, and the labels, which it is not given; all samples of a batch have one shape.
Batch: TypeAlias = "Mapping[str, Tensor]"
LABELS = "labels"
GRADIENTS = 8192  # random gradients that a calibration should see, at least
DRAWS = 8  # of them for a batch, at the most
S = TypeVar("S", bound=Settings)


class Samples(ABC):
    """What a model is run on. Nothing is padded: a batch holds samples of one shape."""

    source: str  # in words
    unit: ClassVar[str]  # "tokens", "images", "pairs": what progress and records count
    each: ClassVar[str] = "samples"  # what several of them are called
    begin: str = ""  # the special tokens that each begins with, as they are written

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, first: int, last: int) -> Batch:
        """Return the samples first … last − 1, which have one shape."""

    @abstractmethod
    def take(self, places: Sequence[int]) -> Self:
        """Return some of the samples."""

    @abstractmethod
    def __add__(self, others: Self) -> Self:
        """Return these samples, and others behind them."""

    @abstractmethod
    def units(self, first: int, last: int) -> int:
        """Return how many of its units the samples first … last − 1 hold."""

    @property
    @abstractmethod
    def shape(self) -> list[int]:
        """How many there are, and of what size, for a fingerprint."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """The hash of what the model is given."""

    @property
    def small(self) -> Batch:
        """The smallest batch that shows how the model runs: the first sample, or the beginning of it."""
        return self.batch(0, 1)

    @property
    def predictions(self) -> int:
        """How many predictions the model makes for all of them."""
        return self.units(0, len(self))

    @property
    def words(self) -> str:
        """How many there are, in words."""
        predictions = self.predictions
        further = f" with {predictions:,} predictions" if predictions != len(self) else ""
        return f"{len(self):,} {self.unit}{further}"

    def spans(self, size: int) -> list[tuple[int, int]]:
        """Return the batches, as first and last: up to ``size`` samples that follow one another and have one shape."""
        return [(first, min(first + size, len(self))) for first in range(0, len(self), size)]

    def __getitem__(self, places: slice) -> Self:
        return self.take(range(len(self))[places])

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(i, i + 1) for i in range(len(self)))


@dataclass(frozen=True)
class Data:
    """The samples of a run: those that it is calibrated on, and those set aside to measure on or to stop a refinement on."""

    samples: Samples
    held_out: Samples  # may be empty
    asked: int  # units that were asked for
    notes: tuple[str, ...] = ()  # on what of the data was not read
    each: int = 1  # samples that are set aside for each window that a text would have set aside

    @property
    def units(self) -> int:
        """The units that are calibrated on."""
        return self.samples.units(0, len(self.samples))

    def to_measure(self, windows: int) -> Samples:
        """Return those that the quality is measured on, where a text would have so many windows."""
        return self.held_out[: windows * self.each]

    def to_stop(self, windows: int) -> Samples:
        """Return the others that are set aside."""
        return self.held_out[windows * self.each :]


class Task(ABC):
    """What a model is for."""

    name: ClassVar[str]
    output: ClassVar[Output]
    settings: ClassVar[type[Settings]]
    perplexity: ClassVar[bool] = False  # whether exp(loss) is a word of it
    streams: ClassVar[bool] = False  # samples are windows of text, all of one shape, and can go block by block
    prediction: ClassVar[str] = "prediction"  # what one is called
    fallback: ClassVar[bool] = False  # takes what no other does
    mappings: ClassVar[tuple[str, ...]] = ()  # transformers' tables of the classes that it is for, as "MASKED_LM"
    pipeline: ClassVar[str | None] = None  # what the model hub calls it
    centred: ClassVar[bool] = True  # whether taking the mean off the inputs of layers with a bias pays, as measured

    def fits(self, model: Any) -> bool:
        """Say whether a model is of this kind: by transformers' own tables, unless a task knows better."""
        return any(type(model).__name__ in classes_of(name) for name in self.mappings)

    def fitted(self, settings: S, loaded: Any, *, quiet: bool = False) -> S:
        """Return settings that suit a model, where those that were left to their defaults do not.

        Raises:
            TwofoldError: if one that was given does not.
        """
        return settings

    @abstractmethod
    def data(
        self,
        loaded: Any,  # twofold.model.load.LoadedModel
        settings: Settings,
        hashed: str,
        given: Iterable[Any] | None = None,
        *,
        held_out: int,
        quiet: bool = False,
    ) -> Data:
        """Read the samples that the settings ask for.

        Args:
            hashed: the hash of the model, where samples are made by it and kept.
            given: in the place of those that the settings name.
            held_out: how many samples are set aside.

        Raises:
            TwofoldError: if they are not to be had, or too few.
        """

    @abstractmethod
    def measured(self, loaded: Any, settings: Settings) -> Samples | None:
        """Read the samples that the settings name to measure on; None if they name none.

        Raises:
            TwofoldError: if they can't be used.
        """

    def of_windows(self, windows: Any, loaded: Any, seed: int = 0) -> Samples:
        """Return the samples that windows of text make, for a task that reads such."""
        found: Samples = windows
        return found

    @abstractmethod
    def example(self, model: Any) -> Batch:
        """Return a small batch to run a model on, always the same."""

    def call(self, module: Any, batch: Batch) -> Any:
        """Run a model, or its body, on a batch, without its labels."""
        return module(**{name: tensor for name, tensor in batch.items() if name != LABELS})

    @abstractmethod
    def read(self, result: Any, batch: Batch, model: Any) -> Tensor:  # (predictions, k)
        """Return the outputs in what the model gives for a batch, with their graph.

        Raises:
            TwofoldError: if it gives none of this kind.
        """

    def labels(self, batch: Batch) -> Tensor | None:  # (predictions,)
        """Return what is right for each prediction, −1 where there is nothing; None if nothing is known.

        Places of a batch whose label is −1 are no predictions.
        """
        labels = batch[LABELS].flatten() if LABELS in batch else None
        return None if labels is None else labels[labels >= 0]

    def score(self, loaded: Any, samples: Samples) -> dict[str, float]:
        """Return the task's own measures of a model on samples, by name: accuracy, wer, bleu; none if it has none."""
        return {}

    def outputs(self, model: Any, batch: Batch) -> Tensor:  # (predictions, k)
        """Run a model on a batch, on the model's device, and return its outputs with their graph."""
        batch = on_device(batch, model.device, model.dtype)
        return self.read(self.call(model, batch), batch, model)

    def draws(self, samples: Samples, asked: int | None) -> int:
        """Return how many random gradients are drawn for a batch.

        Args:
            asked: so many; None for as many as samples with few predictions need.
        """
        if asked is not None or self.streams:
            return asked or 1
        return min(DRAWS, -(-GRADIENTS // max(samples.predictions, 1)))

    def predicts(self, model: Any, samples: Samples) -> bool:
        """Say whether a model gives outputs of this kind for some samples."""
        try:
            self.outputs(model, samples.small)
            return True
        except TwofoldError:
            return False

    def knows(self, model: Any, samples: Samples) -> bool:
        """Say whether a model whose weights are on disk could be run on some samples."""
        return True


def classes_of(table: str) -> Collection[str]:
    """Return the names of the classes in one of transformers' tables, MODEL_FOR_…_MAPPING_NAMES; "" for base models."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES" if table else "MODEL_MAPPING_NAMES").values()
    return {each for name in names for each in ((name,) if isinstance(name, str) else name)}


def on_device(batch: Batch, device: Any, dtype: Any = None) -> Batch:
    """Return a batch on a device; what is no whole number in it in a dtype, if one is given."""
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in batch.items()}


TASKS: Registry[Task] = Registry("task", __name__)
T = TypeVar("T", bound=type[Task])


def task(kind: T) -> T:
    """Register a class as a task."""
    TASKS.add(kind.name, kind())
    return kind


class Tasked(Settings):
    """What the model is for."""

    TITLE = "Model and machine"

    task: Annotated[
        str, Field(description=f"what the model is for: auto finds it; or one of {', '.join(TASKS.names())}")
    ] = "auto"


def find_task(model: Any, name: str = "auto") -> Task | None:
    """Return the task of a name, or the first that fits a model; None if none does.

    Raises:
        TwofoldError: if there is no task of that name.
    """
    if name != "auto":
        return TASKS.get(name)
    tasks = sorted(TASKS.all(), key=lambda task: task.fallback)
    return next((task for task in tasks if task.fits(model)), None)
