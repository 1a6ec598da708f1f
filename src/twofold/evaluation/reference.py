"""What the original says of the samples, computed once, for models that are compared with it one after another."""

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
from twofold.task.output.quality import Predict, Quality, Totals

LIMIT = 16e9  # bytes that may be kept; beyond, the original is run again for every model


class DenseReference:
    """What is compared of the original's predictions, in a folder: of logits four bytes a class.

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
        sums = {i: self._read(i, "sums") for i in self._stored}
        missing = [i for i in range(count) if i not in self._stored]
        fits = True
        with progress("Measuring the original", count, done=len(sums), unit=samples.each, quiet=quiet) as tick:
            for i in missing:
                totals = Totals(task)
                values = totals.score(original(i), self._labels(i))
                sums[i] = torch.tensor([totals.loss, totals.known, totals.predictions], dtype=torch.float64)
                if i == missing[0]:
                    fits = len(missing) * values.nbytes <= min(LIMIT, free_space(folder) / 2)
                if fits:
                    write_part(self._path(i), {"values": values, "sums": sums[i]}, self.mark)
                    self._stored.add(i)
                tick()
        if not fits and not quiet:
            say("what the original says takes too much of the disk to be kept, so it is run again for every model")
        loss, known, predictions = (sum(sums[i][k].item() for i in range(count)) for k in range(3))
        self.quality = Totals(task, loss, int(known), int(predictions)).quality

    @torch.no_grad()
    def measure(self, model: Predict, original: Predict, *, quiet: bool = False) -> Quality:
        """Measure a model on the samples, against the original: the same numbers as ``measure_quality`` of both.

        Args:
            original: is asked where nothing was kept, so it must still give what the original does.
        """
        totals = Totals(self.task)
        with progress("Measuring", len(self.samples), unit=self.samples.each, quiet=quiet) as tick:
            for i in range(len(self.samples)):
                labels = self._labels(i)
                values = totals.score(model(i), labels)
                stored = i in self._stored
                dense = self._read(i, "values") if stored else self.task.output.score(original(i), labels)[1]
                totals.compare(dense.to(values.device), values)
                tick()
        return totals.quality

    def _labels(self, i: int) -> Tensor | None:
        return self.task.labels(self.samples.batch(i, i + 1))

    def _path(self, i: int) -> Path:
        return self.folder / f"reference-{i:04d}.safetensors"

    def _is_whole(self, i: int) -> bool:
        try:
            return set(read_names(self._path(i), self.mark)[0]) == {"values", "sums"}
        except TwofoldError:
            return False

    def _read(self, i: int, name: str) -> Tensor:
        try:
            with safe_open(self._path(i), "pt") as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise TwofoldError(f"{self._path(i)} can't be read ({error}); run again") from error
