"""The moments of a model's targets: which are collected, and how they are kept on disk.

For each target either side of a pair suffices, and the smaller one is collected (section 1 of docs/design.md):
    input/LEADER           C = E[x xᵀ] (n, n), once for a group of targets with one input
    input_mean/LEADER      E[x] (n,)
    output_mean/TARGET     W E[x] = E[y] (m,), where W C Wᵀ is to be centred
    output/TARGET          W C Wᵀ = E[y yᵀ] (m, m), y without the bias
    gradient/TARGET        G = E[g gᵀ] (m, m), g the gradient of the loss at the output
    input_gradient/TARGET  Wᵀ G W = E[z zᵀ] (n, n), z = Wᵀ g
    input_abs/LEADER       E|x| (n,)
    input_square/LEADER    E[x²] (n,), the diagonal of C where C itself may be too large
    gradient_square/TARGET E[g²] (m,), that of G
    fisher_rows/TARGET     Σ_j E[(g_i x_j)²] (m,)
    input_trace/LEADER, gradient_trace/TARGET: tr C, tr G
    rows/TARGET            how many vectors the layer was given: the tokens, unless it is called several times or not for all
A folder holds the sums in parts, one for each stretch of blocks, and moments.json, which is written last. Inputs are averaged
over the rows that a layer saw and gradients over the tokens, so that their product counts each call once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.calibrate.request import Request
from twofold.calibrate.statistics import FORWARD, STATISTICS
from twofold.errors import TwofoldError
from twofold.host.files import write_text
from twofold.host.parts import FORMAT, Parts, read_names, subset
from twofold.linalg.metric import working_dtype
from twofold.model.target import Target
from twofold.objectives import LayerMoments

DESCRIPTION = "moments.json"


@dataclass
class Moments:
    """The collected sums, and what they belong to."""

    sums: Mapping[str, Tensor]  # "input/LEADER" → sum over tokens, and so on
    predictions: int
    groups: dict[str, str]
    fingerprint: str
    about: dict[str, str] = field(default_factory=dict)  # model, source, settings: for a reader

    def layer(self, name: str, *, centred: bool = False) -> LayerMoments:
        """Return the moments of one target: of inputs averaged over the rows it was given, of gradients over the predictions.

        Args:
            centred: take those of x − E[x] in the place of x.
        """
        leader, rows = self.groups.get(name, name), max(self.rows(name), 1.0)
        moments: dict[str, Any] = {}
        for kind, statistic in STATISTICS.items():
            key = f"{kind}/{leader if statistic.feed == 'inputs' else name}"
            if kind != "rows" and key in self.sums:
                total = self.sums[key]
                if centred:
                    total = total.to(working_dtype(total.device))
                moment = total / (rows if kind in FORWARD else self.predictions)
                moments[kind] = float(moment) if statistic.shape == "number" else moment
        layer = LayerMoments(**moments)
        return _centred(layer) if centred else layer

    def only(self, request: Request) -> Moments:
        """Return what a request asks for, as if nothing else had been collected."""
        return replace(self, sums=subset(self.sums, self.sums.keys() & set(request.names())))

    def rows(self, name: str) -> float:
        """Return how many input vectors a target was given."""
        return float(self.sums[f"rows/{name}"]) if f"rows/{name}" in self.sums else float(self.predictions)

    def unused(self, targets: Iterable[Target]) -> dict[str, str]:
        """Find the targets that the calibration can say nothing about, each with the reason."""
        reasons = {}
        for target in targets:
            if self.rows(target.name) == 0:
                reasons[target.name] = "not called when the model runs on the calibration text"
            elif float(self.sums.get(f"gradient_trace/{target.name}", torch.ones(()))) == 0:
                reasons[target.name] = "no gradient reaches it: it does not change the output"
        return reasons

    def finish(self, folder: Path, parts: list[str]) -> None:
        """Write the description of the parts that a folder holds; from then on it counts as whole."""
        described = {"tokens": self.predictions, "groups": self.groups, "about": self.about, "parts": parts}
        description = {"format": FORMAT, "fingerprint": self.fingerprint, **described}
        write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, fingerprint: str | None = None) -> Moments:
        """Read moments, and make sure that they are those of this model, data, seed and settings.

        The sums are read from the disk when they are asked for.

        Raises:
            TwofoldError: if the folder is not whole, or belongs to something else.
        """
        if not folder.is_dir():
            raise TwofoldError(f"there are no moments in {folder}: it is not a folder")
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            if description["format"] != FORMAT:
                raise TwofoldError(f"{folder} holds no moments of this version; delete it and run again")
            mark = str(description["fingerprint"])
            if fingerprint is not None and mark != fingerprint:
                raise TwofoldError(
                    f"the moments in {folder} belong to another model, text, seed or setting; name another folder or delete it"
                )
            places: dict[str, Path] = {}
            for part in description["parts"]:
                path = folder / Path(part).name
                names, _ = read_names(path, mark)
                places |= dict.fromkeys(names, path)
            about, groups = dict(description["about"]), dict(description["groups"])
            predictions = int(description["tokens"])
            if predictions < 1 or not places:
                raise ValueError("it holds none")
            return cls(Parts(places), predictions, groups, mark, about)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TwofoldError(
                f"the moments in {folder} can't be read ({error}); delete the folder and run again"
            ) from error


def _centred(layer: LayerMoments) -> LayerMoments:
    """Return the moments of x − E[x]: what is taken off is the square of the mean of the very rows that were summed."""
    mean, outputs = layer.input_mean, layer.output_mean
    assert mean is not None
    more: dict[str, Any] = {"input_trace": max(layer.input_trace - float(mean.square().sum()), 0.0)}
    if layer.input is not None:
        more["input"] = layer.input - torch.outer(mean, mean)
    if layer.output is not None:
        assert outputs is not None
        more["output"] = layer.output - torch.outer(outputs, outputs)
    if layer.input_square is not None:
        more["input_square"] = (layer.input_square - mean.square()).clamp_min(0)
    return replace(layer, **more)
