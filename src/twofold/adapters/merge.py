"""Adapters put into a model, or several into one: exactly by growing the rank, or re-compressed to the size of before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from twofold.adapters.folder import load_adapter, write_adapter
from twofold.adapters.metric import Metrics
from twofold.adapters.ranks import by_budget
from twofold.errors import TwofoldError
from twofold.host.folders import check_apart, check_output, staged_folder
from twofold.host.quiet import quiet_bars
from twofold.linalg.metric import working_dtype
from twofold.model.kinds import dense_weight
from twofold.model.load import LoadedModel, load_model
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import cast_weights, replace_module


class Merge(pydantic.BaseModel, extra="forbid"):
    """What was merged, kept as run.json."""

    kind: str = "merge"
    model: str
    adapters: list[str]
    weights: list[float]
    base_sha256: str = ""
    ranks: dict[str, int]  # of the factored layers, or of the one adapter
    parameters_before: int = 0
    parameters_after: int = 0
    energy: float = 1.0  # one adapter: the share of the change that is kept
    metric: str = ""
    notes: list[str] = []


def merge(
    model: str,
    adapters: list[str],
    out: Path | str,
    *,
    weight: list[float] | None = None,
    recompress: bool = False,
    adapter_rank: int | None = None,
    moments: Path | None = None,
    overwrite: bool = False,
) -> Merge:
    """Merge LoRA adapters, and write the model, or with ``adapter_rank`` one adapter.

    Args:
        weight: how much each adapter counts; 1 each by default.
        recompress: bring each factored layer back to the rank that it had.
        adapter_rank: a budget: as many numbers as this rank in every adapted layer would take, spent where they count most.
        moments: of the model's calibration: what is left out is measured in their metric.

    Raises:
        TwofoldError: if an adapter does not belong to the model, or the settings do not fit.
    """
    weight = weight or [1.0] * len(adapters)
    if len(weight) != len(adapters):
        raise TwofoldError(
            f"there are {len(adapters)} adapters and {len(weight)} values of `weight`; give one for each"
        )
    if recompress and adapter_rank is not None:
        raise TwofoldError("give either `recompress` or `adapter_rank`")
    out = Path(out).expanduser().resolve()
    check_output(out, overwrite)
    loaded = load_model(model)
    check_apart(out, loaded.source, [Path(one).expanduser() for one in adapters])
    record = Merge(
        model=model, adapters=adapters, weights=weight, ranks={},
        base_sha256=loaded.shards.hash("") if loaded.shards is not None else "",
        parameters_before=sum(p.numel() for p in loaded.model.parameters()),
    )  # fmt: skip
    adapted: Any = loaded.model
    for number, one in enumerate(adapters):
        adapted = load_adapter(adapted, Path(one).expanduser(), f"adapter{number}", loaded)
    _check_kinds(adapted, record, adapter_rank is not None)
    metrics = Metrics(moments)
    if adapter_rank is not None:
        layers = _one_adapter(adapted, weight, adapter_rank, metrics, record)
        with staged_folder(out, overwrite) as folder:
            write_adapter(folder, layers, str(loaded.source or model))
            (folder / "run.json").write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return record
    before = _factored(loaded.model)
    columns = [name for name, layer in before.items() if isinstance(layer, DenseColumnsLinear)]
    old = {name: layer.rank for name, layer in before.items() if name not in columns}
    merged = merge_into(adapted, weight)
    if recompress:
        record.notes += recompress_to(merged, old, metrics)
        record.notes += [f"{name} has dense columns and keeps its grown rank" for name in columns]
        record.metric = metrics.words
    record.ranks = {name: layer.rank for name, layer in _factored(merged).items()}
    record.parameters_after = sum(p.numel() for p in merged.parameters())
    _write(merged, loaded, record, out, overwrite)
    return record


def _check_kinds(adapted: PeftModel, record: Merge, together: bool) -> None:
    """Refuse what would not be the sum of the adapters.

    Raises:
        TwofoldError: if DoRA is scaled or added to another adapter; or if one adapter is asked for, of others than plain LoRA.
    """
    for number, (path, weight) in enumerate(zip(record.adapters, record.weights, strict=True)):
        config = adapted.peft_config[f"adapter{number}"]
        dora = getattr(config, "use_dora", False)
        if dora and (weight != 1 or len(record.adapters) > 1):
            raise TwofoldError(
                f"{path} is DoRA, which also sets the length of each weight: it can't count more or less than once, nor be added "
                "to other adapters; merge it alone, without `weight`"
            )
        more = config.bias != "none" if hasattr(config, "bias") else False
        more = more or bool(getattr(config, "lora_bias", False) or getattr(config, "modules_to_save", None))
        if together and (config.peft_type != PeftType.LORA or dora or more):
            raise TwofoldError(
                f"{path} is no plain LoRA, and `adapter_rank` puts the products of plain LoRA into one adapter; merge it without"
            )


def merge_into(adapted: PeftModel, weights: list[float]) -> Any:
    """The model with all its adapters put into it; the rank of a factored layer grows by theirs."""
    names = [f"adapter{number}" for number in range(len(weights))]
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for name, weight in zip(names, weights, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
        elif hasattr(module, "merge") and hasattr(module, "base_layer") and any(weight != 1 for weight in weights):
            raise TwofoldError("only LoRA adapters can count more or less than once; leave `weight` out")
    return adapted.merge_and_unload(adapter_names=names)


@torch.no_grad()
def recompress_to(model: nn.Module, ranks: dict[str, int], metrics: Metrics) -> list[str]:
    """Bring layers whose rank grew back to the rank that they had, with the least loss in the metric.

    Args:
        ranks: by the names that the layers have in the merged model.

    Returns:
        Notes: of layers that stay larger.
    """
    notes: list[str] = []
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        if isinstance(layer, DenseColumnsLinear):
            notes.append(f"{name} has dense columns and keeps its grown rank")
            continue
        if isinstance(layer, FactoredLinear) and layer.rank <= rank:
            continue
        weight = dense_weight(layer).detach().to(working_dtype(next(layer.parameters()).device))
        left, right = metrics.of(name, weight).decompose(weight).factors(rank)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        transposed = getattr(layer, "transposed", not isinstance(layer, nn.Linear))
        dtype = next(layer.parameters()).dtype
        again = FactoredLinear.from_factors(left, right, bias, transposed=bool(transposed), dtype=dtype)
        again.requires_grad_(any(p.requires_grad for p in layer.parameters()))
        replace_module(model, name, again)
    from twofold.checkpoint.plugin import attach

    attach(model)
    return notes


@torch.no_grad()
def _one_adapter(
    adapted: PeftModel, weights: list[float], rank: int, metrics: Metrics, record: Merge
) -> dict[str, tuple[Tensor, Tensor]]:
    """The sum of all adapters as one, within a budget."""
    values: dict[str, Tensor] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    costs: dict[str, int] = {}
    for name, module in adapted.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        change: Tensor | None = None
        count = 0
        for number, weight in enumerate(weights):
            key = f"adapter{number}"
            if key not in module.lora_A:
                continue
            if module.lora_variant.get(key) is not None:
                raise TwofoldError(
                    f"{record.adapters[number]} is no plain LoRA, so it can't be put into one adapter; merge it"
                )
            down, up = module.lora_A[key].weight, module.lora_B[key].weight
            part = up.to(working_dtype(up.device)) @ down.to(working_dtype(up.device)) * (module.scaling[key] * weight)
            change = part if change is None else change + part
            count += down.shape[0]
        if change is None or not change.any():
            continue
        found = metrics.of(name, change).decompose(change)
        count = min(count, *change.shape)
        values[name], factors[name] = found.values[:count].float(), found.factors(count)
        costs[name] = sum(change.shape)
    if not values:
        raise TwofoldError("the adapters change nothing, so there is nothing to merge")
    ranks = {name: r for name, r in by_budget(values, costs, rank * sum(costs.values())).items() if r}
    total = sum(float(found.sum()) for found in values.values())
    record.energy = sum(float(values[name][:r].sum()) for name, r in ranks.items()) / total
    record.ranks, record.metric = ranks, metrics.words
    record.parameters_after = sum(r * costs[name] for name, r in ranks.items())
    return {name: (factors[name][0][:, :r], factors[name][1][:r]) for name, r in ranks.items()}


def _factored(model: Any) -> dict[str, FactoredLinear]:
    """The factored layers by their names in the plain model, whether adapters stand on it or not."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear)
    }


def _write(model: Any, loaded: LoadedModel, record: Merge, out: Path, overwrite: bool) -> None:
    with staged_folder(out, overwrite) as folder, quiet_bars():
        cast_weights(model, loaded.stored_dtype)
        model.save_pretrained(folder)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)
        (folder / "run.json").write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
