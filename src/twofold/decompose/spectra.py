"""The decompositions of all targets, in memory or in a folder, so that they need not fit in memory and outlive a killed run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from twofold.errors import TwofoldError
from twofold.host.parts import take_part, write_part
from twofold.linalg.spectrum import Spectrum, smaller_side
from twofold.model.target import Target


class Spectra:
    """Spectra by the name of their target; ``values`` are what the plan and the report need of them.

    The bases are kept in float32 (``truncate`` makes up for the rounding).
    """

    def __init__(self, folder: Path | None = None, mark: str = "", *, bases: bool = True) -> None:
        """
        Args:
            folder: where they are kept; in memory if it is None.
            mark: what they belong to: moments, objective, damping. Files of another mark are made again.
            bases: whether factors will be made from them, or only a plan.
        """
        self.folder, self.bases = folder, bases
        self.mark = hashlib.sha256(mark.encode()).hexdigest()
        self.values: dict[str, NDArray[np.float64]] = {}  # σ² (k,), largest first
        self._bases: dict[str, torch.Tensor] = {}
        self._places: dict[str, Path] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take up what an earlier run or other processes have written."""
        for path in sorted(self.folder.glob("spectra-*.safetensors")) if self.folder is not None else []:
            self._take(path)

    def _take(self, path: Path) -> None:
        """Take up a file if it is whole and belongs here; remove it if not."""
        part = take_part(path, self.mark)
        if part is None:
            path.unlink(missing_ok=True)
            return
        for name in part[0]:
            kind, _, target = name.partition("/")
            if kind == "values":
                self.values[target], self._places[target] = part[0][name].numpy(), path

    def lacks(self, targets: Iterable[Target]) -> list[Target]:
        """Return the targets that have not been decomposed."""
        return [target for target in targets if target.name not in self.values]

    def add(self, unit: str, spectra: dict[str, Spectrum]) -> None:
        """Keep the spectra of some targets under a name of their own."""
        for name, spectrum in spectra.items():
            self.values[name] = spectrum.values.cpu().double().numpy()
        bases = {name: spectrum.basis.to(torch.float32) for name, spectrum in spectra.items() if self.bases}
        if self.folder is None:
            self._bases |= bases
            return
        tensors = {f"values/{name}": spectrum.values.double() for name, spectrum in spectra.items()}
        tensors |= {f"basis/{name}": basis for name, basis in bases.items()}
        names = hashlib.sha256(" ".join(sorted(spectra)).encode()).hexdigest()[:8]  # other targets, another file
        path = self.folder / f"spectra-{unit}-{names}.safetensors"
        write_part(path, tensors, self.mark)
        self._places |= dict.fromkeys(spectra, path)

    def get(self, target: Target, dtype: torch.dtype, device: torch.device) -> Spectrum:
        """Return the spectrum of one target.

        Raises:
            TwofoldError: if its file can't be read any more.
        """
        if target.name in self._bases:
            basis = self._bases[target.name]
        else:
            path = self._places[target.name]
            try:
                with safe_open(path, "pt") as file:
                    basis = file.get_tensor(f"basis/{target.name}").clone()
            except (SafetensorError, OSError) as error:
                raise TwofoldError(f"the spectra in {path} can't be read ({error}); run again") from error
        values = torch.from_numpy(self.values[target.name])
        side = smaller_side(target.out_features, target.in_features)
        return Spectrum(values.to(device, dtype), basis.to(device), side)
