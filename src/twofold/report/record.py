"""The record of a run: what was done, what it took, what was measured. Kept as run.json beside the checkpoint."""

from __future__ import annotations

import pydantic

from twofold.checkpoint.beside import Licence
from twofold.host.clock import Machine
from twofold.recipe import Recipe
from twofold.refine import Refined
from twofold.task import Samples, Task
from twofold.task.output.quality import Quality


class Measured(pydantic.BaseModel, extra="forbid"):
    """The quality of the original and of the factored model on the same samples."""

    text: str
    windows: int
    window: int
    size: str = ""  # in words, where the samples are no windows
    prediction: str = "token"  # what one is called
    agreement: str = "same most likely token"  # what is told by it
    original: dict[str, float | int | None]
    factored: dict[str, float | int | None]
    scores: dict[str, tuple[float | None, float | None]] = {}  # the task's own measures of both, by name

    @classmethod
    def of(cls, text: str, samples: Samples, task: Task, original: Quality, factored: Quality) -> Measured:
        windows, window = samples.shape
        told = {} if task.fallback else {"agreement": task.output.agreement, "prediction": task.prediction}
        if samples.each != "windows":
            told["size"] = samples.words
        both = {"original": vars(original), "factored": vars(factored)}
        return cls(text=text, windows=windows, window=window, **both, **told)  # type: ignore[arg-type]

    @property
    def words(self) -> str:
        """What was measured on, in words."""
        return self.size or f"{self.windows:,} windows of {self.window:,} tokens"

    @property
    def ratio(self) -> float | None:
        """The factored model's perplexity over the original's."""
        before, after = self.original.get("perplexity"), self.factored.get("perplexity")
        return after / before if before and after is not None else None


class Sample(pydantic.BaseModel, extra="forbid"):
    """What both models answer to a prompt, greedily."""

    prompt: str
    original: str
    factored: str


class Run(pydantic.BaseModel, extra="forbid"):
    """A whole run."""

    recipe: Recipe
    machine: Machine
    calibration: str  # in words
    calibration_tokens: int  # or samples
    task: str = "causal-lm"
    unit: str = "tokens"  # of what was calibrated on
    calibration_sha256: str
    windows_begin: str = ""  # the special tokens that each window of text begins with, as <bos>; empty if with text
    fingerprint: str
    moments_reused: bool
    keep: float
    keep_model: float
    parameters_before: int
    parameters_after: int
    target_before: int
    target_after: int
    bytes_before: int
    bytes_after: int
    predicted_divergence: float | None
    probes: list[Probe] = []  # what was measured in the search for the size, where a quality was asked for
    refinement: list[Refined] = []
    quality: Measured | None = None
    samples: list[Sample] = []
    seconds: dict[str, float] = {}
    peak_memory: int = 0  # bytes, resident
    notes: list[str] = []
    explanation: list[str] = []  # of the plan, if it was asked for
    carried: list[str] = []  # files of the original that stand beside the weights as they were
    licence: Licence = {}  # of the original: what its card says, or the file that holds it


class Probe(pydantic.BaseModel, extra="forbid"):
    """What was measured of the model at one share."""

    keep: float  # the share of the factorized weights that was asked for
    kept: float  # and the one that its plan keeps
    perplexity: float | None  # None if the model's numbers overflow, or its task has none
    divergence: float | None  # nats a prediction
    met: bool  # whether it meets the goal
