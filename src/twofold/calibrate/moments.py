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
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.host.files import write_text, write_whole
from twofold.model.weights import Target
from twofold.objectives.base import LayerMoments, Statistic

FORMAT = "twofold-moments-3"
DESCRIPTION = "moments.json"
SQUARE = ("input", "output", "gradient", "input_gradient")  # kinds of moments that are (k, k)


@dataclass(frozen=True)
class Request:
    """What to collect, and from where: statistic → target name → size of the moment."""

    sizes: dict[str, dict[str, int]]  # "input" → {leader: n}, …

    @property
    def backward(self) -> bool:
        """Whether gradients are needed."""
        return any(self.sizes.get(kind) for kind in ("gradient", "input_gradient", "gradient_square", "fisher_rows"))

    @property
    def numbers(self) -> int:
        """How many numbers the moments hold."""
        return sum(self.numbers_of(kind) for kind in self.sizes)

    def names(self) -> list[str]:
        """The names of the moments, as they are kept."""
        return [f"{kind}/{name}" for kind, owners in self.sizes.items() for name in owners]

    def numbers_of(self, kind: str, targets: Iterable[str] | None = None) -> int:
        """How many numbers the moments of one kind hold, of all targets or of some."""
        owners = self.sizes[kind]
        chosen = owners if targets is None else owners.keys() & set(targets)
        return sum(owners[name] ** 2 if kind in SQUARE else owners[name] for name in chosen)


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
        if "whole_input" in needs:
            ask("input", leader, n)
        if "input_mean" in needs:
            ask("input_mean", leader, n)
        if "input_abs" in needs:
            ask("input_abs", leader, n)
        if "input_square" in needs:
            ask("input_square", leader, n)
        for target in group:
            ask("rows", target.name, 1)
            if "gradient" in needs:
                if target.out_features <= n or both_sides:
                    ask("gradient", target.name, target.out_features)
                else:
                    ask("input_gradient", target.name, n)
                ask("gradient_trace", target.name, 1)
            if "gradient_square" in needs:
                ask("gradient_square", target.name, target.out_features)
                ask("gradient_trace", target.name, 1)
            if "fisher_rows" in needs:
                ask("fisher_rows", target.name, target.out_features)
    return Request(sizes)


@dataclass
class Moments:
    """The collected sums, and what they belong to."""

    sums: Mapping[str, Tensor]  # "input/LEADER" → sum over tokens, and so on
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
            "input_mean": (leader, rows), "input_square": (leader, rows),
            "gradient": (name, self.tokens), "input_gradient": (name, self.tokens), "fisher_rows": (name, self.tokens),
            "gradient_trace": (name, self.tokens), "gradient_square": (name, self.tokens),
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
            "tokens": self.tokens,
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
            tokens = int(description["tokens"])
            if tokens < 1 or not places:
                raise ValueError("it holds none")
            return cls(Parts(places), tokens, groups, mark, about)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TwofoldError(
                f"the moments in {folder} can't be read ({error}); delete the folder and run again"
            ) from error


class Chosen(Mapping[str, Tensor]):
    """Some of the sums by name."""

    def __init__(self, sums: Mapping[str, Tensor], names: Set[str]) -> None:
        self.sums, self.names = sums, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.sums[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


class Parts(Mapping[str, Tensor]):
    """The sums of several files by name; each is read when it is asked for, so that they need not fit in memory."""

    def __init__(self, places: dict[str, Path]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        path = self.places[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name).clone()  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise TwofoldError(
                f"the moments in {path} can't be read ({error}); delete {path.parent} and run again"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def write_part(path: Path, sums: dict[str, Tensor], fingerprint: str, about: dict[str, str] | None = None) -> None:
    """Write sums to one file, whole or not at all.

    Raises:
        TwofoldError: if the disk does not take them.
    """
    metadata = {"format": FORMAT, "fingerprint": fingerprint, **(about or {})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sums.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_names(path: Path, fingerprint: str) -> tuple[list[str], dict[str, str]]:
    """The names in a part, and what else its header says.

    Raises:
        TwofoldError: if it is not whole, or belongs to something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise TwofoldError(
            f"the moments in {path} can't be read ({error}); delete {path.parent} and run again"
        ) from error
    if metadata.get("format") != FORMAT or metadata.get("fingerprint") != fingerprint:
        raise TwofoldError(f"{path} belongs to other moments; delete {path.parent} and run again")
    return names, metadata
