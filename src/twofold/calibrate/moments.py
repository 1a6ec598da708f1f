"""The moments of a model's targets: which are collected, and how they are kept in a file.

For each target either side of a pair suffices, and the smaller one is collected (section 1 of docs/design.md):
    input/LEADER           C = E[x xᵀ] (n, n), once for a group of targets with one input
    output/TARGET          W C Wᵀ = E[y yᵀ] (m, m), y without the bias
    gradient/TARGET        G = E[g gᵀ] (m, m), g the gradient of the loss at the output
    input_gradient/TARGET  Wᵀ G W = E[z zᵀ] (n, n), z = Wᵀ g
    input_abs/LEADER       E|x| (n,)
    fisher_rows/TARGET     Σ_j E[(g_i x_j)²] (m,)
    input_trace/LEADER, gradient_trace/TARGET: tr C, tr G
    rows/TARGET            how many vectors the layer was given: the tokens, unless it is called several times or not for all
A file holds the sums; the number of tokens stands in its metadata. Inputs are averaged over the rows that a layer saw and
gradients over the tokens, so that their product counts each call once.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.objectives.base import LayerMoments, Statistic
from twofold.targets import Target

FORMAT = "twofold-moments-2"


@dataclass(frozen=True)
class Request:
    """What to collect, and from where: statistic → target name → size of the moment."""

    sizes: dict[str, dict[str, int]]  # "input" → {leader: n}, …

    @property
    def backward(self) -> bool:
        """Whether gradients are needed."""
        return any(self.sizes.get(kind) for kind in ("gradient", "input_gradient", "fisher_rows"))

    @property
    def numbers(self) -> int:
        """How many numbers the moments hold."""
        square = ("input", "output", "gradient", "input_gradient")
        return sum(k * k if kind in square else k for kind, names in self.sizes.items() for k in names.values())


def request_statistics(
    targets: Iterable[Target],
    groups: dict[str, str],
    needs: Iterable[Statistic],
    *,
    both_sides: bool = False,
) -> Request:
    """Choose the cheapest moments that serve the objectives.

    Args:
        groups: target → the first target with the same input.
        needs: what the objectives ask for.
        both_sides: collect C and G themselves for every target, whatever their size (to check the others against).
    """
    needs = set(needs)
    sizes: dict[str, dict[str, int]] = {}

    def ask(kind: str, name: str, size: int) -> None:
        sizes.setdefault(kind, {})[name] = size

    members: dict[str, list[Target]] = {}
    for target in targets:
        members.setdefault(groups.get(target.name, target.name), []).append(target)
    for leader, group in members.items():
        n = group[0].in_features
        if "input" in needs:
            products = sum(t.out_features**2 for t in group)
            whole = any(t.out_features > n for t in group) or n * n <= products
            if whole or both_sides:
                ask("input", leader, n)
            else:
                for target in group:
                    ask("output", target.name, target.out_features)
            ask("input_trace", leader, 1)
        if "input_abs" in needs:
            ask("input_abs", leader, n)
        for target in group:
            ask("rows", target.name, 1)
            if "gradient" in needs:
                if target.out_features <= n or both_sides:
                    ask("gradient", target.name, target.out_features)
                else:
                    ask("input_gradient", target.name, n)
                ask("gradient_trace", target.name, 1)
            if "fisher_rows" in needs:
                ask("fisher_rows", target.name, target.out_features)
    return Request(sizes)


@dataclass
class Moments:
    """The collected sums, and what they belong to."""

    sums: dict[str, Tensor]  # "input/LEADER" → sum over tokens, and so on
    tokens: int
    groups: dict[str, str]
    fingerprint: str
    about: dict[str, str] = field(default_factory=dict)  # model, source, settings: for a reader

    def layer(self, name: str) -> LayerMoments:
        """The moments of one target, averaged over the tokens."""
        leader = self.groups.get(name, name)
        rows = max(self.rows(name), 1.0)
        places = {
            "output": (name, rows), "input": (leader, rows), "input_abs": (leader, rows), "input_trace": (leader, rows),
            "gradient": (name, self.tokens), "input_gradient": (name, self.tokens), "fisher_rows": (name, self.tokens),
            "gradient_trace": (name, self.tokens),
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
            input_trace=float(found["input_trace"]) if "input_trace" in found else 0.0,
            gradient_trace=float(found["gradient_trace"]) if "gradient_trace" in found else 0.0,
            input_abs=found.get("input_abs"),
            fisher_rows=found.get("fisher_rows"),
        )

    def rows(self, name: str) -> float:
        """How many input vectors a target was given."""
        return float(self.sums[f"rows/{name}"]) if f"rows/{name}" in self.sums else float(self.tokens)

    def unused(self, targets: Iterable[Target]) -> dict[str, str]:
        """The targets that the calibration can say nothing about, with the reason."""
        reasons = {}
        for target in targets:
            if self.rows(target.name) == 0:
                reasons[target.name] = "not called when the model runs on the calibration text"
            elif float(self.sums.get(f"gradient_trace/{target.name}", torch.ones(()))) == 0:
                reasons[target.name] = "no gradient reaches it: it does not change the output"
        return reasons

    def first_not_finite(self) -> str | None:
        """The first moment that holds NaN or infinity."""
        return next((name for name, tensor in self.sums.items() if not torch.isfinite(tensor).all()), None)

    def save(self, path: Path) -> None:
        """Write the moments to a safetensors file, whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        metadata = {
            "format": FORMAT,
            "tokens": str(self.tokens),
            "groups": json.dumps(self.groups),
            "fingerprint": self.fingerprint,
            "about": json.dumps(self.about),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in self.sums.items()}, temporary, metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise TwofoldError(
                f"the moments can't be written to {path}: {error}; free some space or set TWOFOLD_CACHE"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, fingerprint: str | None = None) -> Moments:
        """Read moments, and make sure that they are those of this model, data, seed and settings.

        Raises:
            TwofoldError: if the file is not whole, or belongs to something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise TwofoldError(f"{path} is not a file of moments of this version; delete it and run again")
                if fingerprint is not None and metadata["fingerprint"] != fingerprint:
                    raise TwofoldError(
                        f"the moments in {path} belong to another model, text, seed or setting; name another file or delete it"
                    )
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise TwofoldError(
                f"the moments in {path} can't be read ({error}); delete the file and run again"
            ) from error
        about = json.loads(metadata["about"])
        return cls(sums, int(metadata["tokens"]), json.loads(metadata["groups"]), metadata["fingerprint"], about)
