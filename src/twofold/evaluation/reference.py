"""What the original says on the evaluation windows, computed once, for models that are compared with it one after another."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.folders import free_space
from twofold.host.parts import read_names, write_part
from twofold.host.progress import progress, say
from twofold.task import Samples, Task
from twofold.task.output.quality import Predict, Quality

LIMIT = 16e9  # bytes that may be kept; beyond, the original is run again for every model


class DenseReference:
    """The log-probabilities of the original at every position, in a folder: four bytes a token of the vocabulary.

    Where they would take more than ``LIMIT``, or half of what is free on the disk, they are not kept.
    """

    @torch.no_grad()
    def __init__(
        self, original: Predict, samples: Samples, task: Task, folder: Path, mark: str, *, quiet: bool = False
    ) -> None:
        """Run the original over the samples; what the folder holds already of the same mark and samples is not done again.

        Raises:
            TwofoldError: if the disk does not take it.
        """
        self.samples, self.task, self.folder = samples, task, folder
        self.mark = hashlib.sha256(f"{mark} {samples.sha256}".encode()).hexdigest()
        count = len(samples)
        self._stored = {i for i in range(count) if self._is_whole(i)}
        losses = {i: float(self._read(i, "loss")) for i in self._stored}
        missing = [i for i in range(count) if i not in self._stored]
        fits = True
        with progress("Measuring the original", count, done=len(losses), unit="windows", quiet=quiet) as tick:
            for i in missing:
                losses[i], values = self._score(original, i)
                if i == missing[0]:
                    fits = len(missing) * values.nbytes <= min(LIMIT, free_space(folder) / 2)
                if fits:
                    part = {"values": values, "loss": torch.tensor(losses[i], dtype=torch.float64)}
                    write_part(self._path(i), part, self.mark)
                    self._stored.add(i)
                tick()
        if not fits and not quiet:
            say("what the original says takes too much of the disk to be kept, so it is run again for every model")
        labels = [task.labels(batch) for batch in samples]
        self.predictions = sum(int((label >= 0).sum()) for label in labels if label is not None)
        self.quality = Quality.of(sum(losses[i] for i in range(count)), self.predictions)

    @torch.no_grad()
    def measure(self, model: Predict, original: Predict, *, quiet: bool = False) -> Quality:
        """Measure a model on the samples, against the original: the same numbers as ``measure_quality`` of both.

        Args:
            original: is asked where nothing was kept, so it must still give what the original does.
        """
        total, divergence, agreed = 0.0, 0.0, 0.0
        with progress("Measuring", len(self.samples), unit="windows", quiet=quiet) as tick:
            for i in range(len(self.samples)):
                loss, values = self._score(model, i)
                dense = self._read(i, "values") if i in self._stored else self._score(original, i)[1]
                further, same = self.task.output.divergence(dense.to(values.device), values)
                total, divergence, agreed = total + loss, divergence + further, agreed + same
                tick()
        return Quality.of(total, self.predictions, divergence, agreed)

    def _score(self, model: Predict, i: int) -> tuple[float, Tensor]:
        return self.task.output.score(model(i), self.task.labels(self.samples.batch(i, i + 1)))

    def _path(self, i: int) -> Path:
        return self.folder / f"reference-{i:04d}.safetensors"

    def _is_whole(self, i: int) -> bool:
        try:
            return set(read_names(self._path(i), self.mark)[0]) == {"values", "loss"}
        except TwofoldError:
            return False

    def _read(self, i: int, name: str) -> Tensor:
        try:
            with safe_open(self._path(i), "pt") as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise TwofoldError(f"{self._path(i)} can't be read ({error}); run again") from error
