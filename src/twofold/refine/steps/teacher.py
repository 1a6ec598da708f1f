"""What the dense model says of each sample, kept as the outputs of its task are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from twofold.host.parts import Parts, take_part, write_part
from twofold.host.progress import progress
from twofold.task import Batch, Samples
from twofold.task.output import Output

PART = 16  # samples in a file


class Teacher:
    """What is kept of the outputs for some samples, on disk or in memory. Of 65,536 next tokens that is 67 MB."""

    def __init__(self, folder: Path | None, mark: str, output: Output) -> None:
        self.folder, self.output = folder, output
        self.mark = hashlib.sha256(f"{mark} {output.name}".encode()).hexdigest()
        self._parts: dict[int, Mapping[str, Tensor]] = {}  # by their first sample

    @torch.no_grad()
    def ask(
        self, outputs: Callable[[Batch], Tensor], samples: Samples, together: int = 1, *, quiet: bool = False
    ) -> None:
        """Run the dense model over samples, so many together; what the folder holds already is not done again."""
        paths = {i: self.folder and self.folder / f"samples-{i:06d}.safetensors" for i in range(0, len(samples), PART)}
        for i, path in paths.items():
            if part := take_part(path, self.mark):
                self._parts[i] = part[0]
        missing = [i for i in paths if i not in self._parts]
        done = len(self._parts) * PART
        with progress("Asking the dense model", len(samples), done=done, unit=samples.each, quiet=quiet) as tick:
            for i in missing:
                answers: dict[str, Tensor] = {}
                some = samples[i : i + PART]
                for first, last in some.spans(together):
                    counts = [some[k : k + 1].predictions for k in range(first, last)]
                    each = torch.split(outputs(some.batch(first, last)), counts)  # type: ignore[no-untyped-call]
                    for number, own in zip(range(first, last), each, strict=True):
                        answers |= {f"{key}/{number}": tensor for key, tensor in self.output.keep(own).items()}
                        tick()
                path = paths[i]
                if path is not None:
                    write_part(path, answers, self.mark)
                self._parts[i] = answers if path is None else Parts(dict.fromkeys(answers, path))

    def answer(self, i: int) -> dict[str, Tensor]:  # (predictions, …) each
        """Return what was kept of one sample."""
        part, row = self._parts[i // PART * PART], i % PART
        places = [key.rpartition("/") for key in part]
        return {key: part[f"{key}/{row}"] for key, _, place in places if place == str(row)}
