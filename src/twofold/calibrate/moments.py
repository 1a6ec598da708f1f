"""The moments of a model's targets: which are collected, and how they are kept on disk.

For each target either side of a pair suffices, and the smaller one is collected (section 1 of docs/design.md):
    input/LEADER           C = E[x xᵀ] (n, n), once for a group of targets with one input
    input_mean/LEADER      E[x] (n,)
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

import torch
from torch import Tensor

from twofold.calibrate.request import Request
from twofold.errors import TwofoldError
from twofold.host.files import write_text
from twofold.host.parts import FORMAT, Chosen, Parts, read_names, write_part
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

    def layer(self, name: str) -> LayerMoments:
        """The moments of one target: of inputs averaged over the rows that it was given, of gradients over the predictions."""
        leader = self.groups.get(name, name)
        rows = max(self.rows(name), 1.0)
        places = {
            "output": (name, rows), "input": (leader, rows), "input_abs": (leader, rows), "input_trace": (leader, rows),
            "input_mean": (leader, rows), "input_square": (leader, rows),
            "gradient": (name, self.predictions), "input_gradient": (name, self.predictions),
            "fisher_rows": (name, self.predictions),
            "gradient_trace": (name, self.predictions), "gradient_square": (name, self.predictions),
        }  # fmt: skip
        found = {
            kind: self.sums[f"{kind}/{owner}"] / count
            for kind, (owner, count) in places.items()
            if f"{kind}/{owner}" in self.sums
        }
        return LayerMoments(
            input=found.get("input"),
            output=found.get("output"),
            gradient=found.get("gradient"),
            input_gradient=found.get("input_gradient"),
            input_mean=found.get("input_mean"),
            input_trace=float(found["input_trace"]) if "input_trace" in found else 0.0,
            gradient_trace=float(found["gradient_trace"]) if "gradient_trace" in found else 0.0,
            input_abs=found.get("input_abs"),
            input_square=found.get("input_square"),
            gradient_square=found.get("gradient_square"),
            fisher_rows=found.get("fisher_rows"),
        )

    def only(self, request: Request) -> Moments:
        """What a request asks for, as if nothing else had been collected."""
        return replace(self, sums=Chosen(self.sums, self.sums.keys() & set(request.names())))

    def rows(self, name: str) -> float:
        """How many input vectors a target was given."""
        return float(self.sums[f"rows/{name}"]) if f"rows/{name}" in self.sums else float(self.predictions)

    def unused(self, targets: Iterable[Target]) -> dict[str, str]:
        """The targets that the calibration can say nothing about, with the reason."""
        reasons = {}
        for target in targets:
            if self.rows(target.name) == 0:
                reasons[target.name] = "not called when the model runs on the calibration text"
            elif float(self.sums.get(f"gradient_trace/{target.name}", torch.ones(()))) == 0:
                reasons[target.name] = "no gradient reaches it: it does not change the output"
        return reasons

    def check(self, request: Request) -> None:
        """Make sure that all that was asked for is there.

        Raises:
            TwofoldError: naming the first moment that is missing.
        """
        for kind, owners in request.sizes.items():
            for name in owners:
                if f"{kind}/{name}" not in self.sums:
                    raise TwofoldError(f"the moments lack {kind} of {name}; delete them and run again")

    def first_not_finite(self) -> str | None:
        """The first moment that holds NaN or infinity."""
        return next((name for name, tensor in self.sums.items() if not torch.isfinite(tensor).all()), None)

    def save(self, folder: Path) -> None:
        """Write all the moments as one part, and their description."""
        write_part(folder / "sums.safetensors", dict(self.sums), self.fingerprint)
        self.finish(folder, ["sums.safetensors"])

    def finish(self, folder: Path, parts: list[str]) -> None:
        """Write the description of the parts that a folder holds; from then on it counts as whole."""
        description = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "tokens": self.predictions,
            "groups": self.groups,
            "about": self.about,
            "parts": parts,
        }
        write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, fingerprint: str | None = None) -> Moments:
        """Read moments, and make sure that they are those of this model, data, seed and settings.

        The sums are read from the disk when they are asked for.

        Raises:
            TwofoldError: if the folder is not whole, or belongs to something else.
        """
        if not folder.is_dir():
            raise TwofoldError(f"there are no moments in {folder}: it is no folder")
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
