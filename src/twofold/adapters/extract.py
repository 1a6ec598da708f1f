"""A LoRA adapter out of two models: what the tuned one has and its base has not, with a rank for each layer."""

from __future__ import annotations

from pathlib import Path

import pydantic
import torch

from twofold.adapters.folder import check_base, task_type, write_adapter
from twofold.adapters.metric import Metrics
from twofold.adapters.ranks import Changes, by_energy
from twofold.checkpoint.beside import LICENCE, Licence
from twofold.checkpoint.peft.lora import whole_layers
from twofold.errors import TwofoldError
from twofold.host.folders import check_apart, check_output, staged_folder
from twofold.host.progress import progress
from twofold.linalg.metric import working_dtype
from twofold.model.kinds import dense_weight
from twofold.model.load import LoadedModel, load_model
from twofold.model.written import Companions
from twofold.nn.layers._basis import SharedBasis

FAR = 0.5  # a tuned weight differs from its base by much less than this share of its norm
DEEP = 8  # ranks that are kept at hand, times the mean rank of a budget


class Extraction(pydantic.BaseModel, extra="forbid"):
    """What was extracted, kept as run.json beside the adapter."""

    kind: str = "extract"
    tuned: str
    base: str
    base_sha256: str = ""
    ranks: dict[str, int]  # of the layers that have one
    numbers: int  # in the adapter
    energy: float  # the share of the change, in the metric, that is kept
    change: float  # ‖tuned − base‖ / ‖base‖ over the linear layers
    metric: str  # in words
    notes: list[str] = []
    carried: list[str] = []  # files of the tuned model that stand beside the adapter: its licence
    licence: Licence = {}  # of the original: what its card says, or the file that holds it


def extract(
    tuned: str,
    base: str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    moments: Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Extraction:
    """Write the adapter that turns ``base`` into ``tuned`` as far as its ranks go; both dense, or factorized.

    Args:
        rank: a budget: as many numbers as this rank in every layer would take, spent where they count most.
        energy: in its place, the share of each layer's change to keep.
        moments: of the base's calibration; the change is measured in their metric.

    Raises:
        TwofoldError: if one is not the base of the other, they do not differ, or the settings do not fit.
    """
    if (rank is None) == (energy is None):
        raise TwofoldError("give either `rank` or `energy`")
    if energy is not None and not 0 < energy <= 1:
        raise TwofoldError(f"`energy` must be a share above 0 and at most 1, got {energy}")
    out = Path(out).expanduser().resolve()
    check_output(out, overwrite)
    first, second = (load_model(name, trust_remote_code=trust_remote_code) for name in (base, tuned))
    check_apart(out, [first.source, second.source], [moments] if moments is not None else [])
    metrics, names = Metrics(moments), matching_layers(first, second)
    if second.source is not None:
        check_base(second.source, first)
    changes, ranks, relative = _compare(first, second, names, metrics, rank, energy, quiet)
    if not changes.values:
        raise TwofoldError(f"the linear layers of {tuned} and {base} are the same, so there is nothing to extract")
    if relative > FAR:
        raise TwofoldError(
            f"{base} is not the base of {tuned}: their linear layers differ by {relative:.0%} of their norm; name the "
            "model that it was tuned from"
        )
    ranks = {name: r for name, r in ranks.items() if r} if rank is None else changes.within(rank)
    companions = Companions.of(second, [LICENCE])
    extraction = Extraction(
        tuned=tuned,
        base=base,
        base_sha256=first.shards.hash("") if first.shards is not None else "",
        ranks=ranks,
        numbers=changes.numbers(ranks),
        energy=changes.energy(ranks),
        change=relative,
        metric=metrics.words,
        notes=[*_others(first, second, names), *companions.notes],
        **companions.record,
    )
    with staged_folder(out, overwrite) as folder:
        companions.write(folder)
        write_adapter(folder, changes.cut(ranks), str(first.source or base), task_type(first.model))
        (folder / "run.json").write_text(extraction.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return extraction


def _compare(
    base: LoadedModel,
    tuned: LoadedModel,
    names: list[str],
    metrics: Metrics,
    rank: int | None,
    energy: float | None,
    quiet: bool,
) -> tuple[Changes, dict[str, int], float]:
    """Decompose the difference of each layer.

    Returns:
        The changes, the ranks that hold the energy if one is asked for, and ‖tuned − base‖ / ‖base‖.
    """
    changes, ranks = Changes(), dict[str, int]()
    whole = changed = 0.0  # squares
    with progress("Comparing", len(names), unit="layers", quiet=quiet) as tick, torch.no_grad():
        for name in names:
            old, new = (dense_weight(loaded.model.get_submodule(name)) for loaded in (base, tuned))
            old = old.to(working_dtype(old.device))
            difference = new.to(old.dtype) - old
            whole += float(old.square().sum())
            changed += float(difference.square().sum())
            changes.costs[name] = sum(difference.shape)
            if difference.any():
                values, factors = metrics.decompose(name, difference)
                depth = min(len(values), DEEP * (rank or 1))
                if energy is not None:
                    depth = ranks[name] = by_energy({name: values}, energy)[name]
                left, right = factors(max(depth, 1))
                changes.values[name], changes.factors[name] = values.float(), (left.float(), right.float())
            tick()
    return changes, ranks, (changed / max(whole, 1e-300)) ** 0.5


def matching_layers(base: LoadedModel, tuned: LoadedModel) -> list[str]:
    """Return the names of the linear layers of both models.

    Raises:
        TwofoldError: naming the first layer that one lacks, or that has another shape.
    """
    names, others = whole_layers(base.model), set(whole_layers(tuned.model))
    for name in [*names, *sorted(others - set(names))]:
        if name not in others or name not in names:
            lacking = base.name if name not in names else tuned.name
            raise TwofoldError(f"{base.name} is not the base of {tuned.name}: {lacking} has no layer {name}")
        shapes = [tuple(dense_weight(loaded.model.get_submodule(name)).shape) for loaded in (base, tuned)]
        if shapes[0] != shapes[1]:
            raise TwofoldError(
                f"{base.name} is not the base of {tuned.name}: the layer {name} is {shapes[0]} in the one and "
                f"{shapes[1]} in the other"
            )
    return names


def _others(base: LoadedModel, tuned: LoadedModel, names: list[str]) -> list[str]:
    """Say what else differs, which no adapter of linear layers holds."""
    bases = [name for name, module in tuned.model.named_modules() if isinstance(module, SharedBasis)]
    inside = tuple(f"{name}." for name in [*names, *bases])
    # A weight by all of its names: what is tied in one model may be two weights in the other.
    old = dict(base.model.named_parameters(remove_duplicate=False))
    differs = [
        name
        for name, new in tuned.model.named_parameters(remove_duplicate=False)
        if not (name.startswith(inside) and not name.endswith(".bias"))
        and (name not in old or old[name].shape != new.shape or not torch.equal(old[name], new))
    ]
    count = len(differs)
    return [f"{count} other weights differ too (first {differs[0]}) and are not in the adapter"] if differs else []
