"""Adapters put into a model, or several into one: exactly by growing the rank, or re-compressed to the size of before."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from twofold.adapters.exact import Example, merged_exactly
from twofold.adapters.folder import load_adapter, task_type, write_adapter
from twofold.adapters.metric import Metrics
from twofold.adapters.ranks import Changes
from twofold.checkpoint.beside import LICENCE, WHOLE, Licence
from twofold.checkpoint.plugin import attach
from twofold.errors import TwofoldError
from twofold.host.folders import check_apart, check_output, staged_folder
from twofold.linalg.metric import working_dtype
from twofold.model.kinds import dense_weight
from twofold.model.load import LoadedModel, load_model
from twofold.model.written import Companions, save_like
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module

# Of an adapter, what takes the place of the model's weights, where a product is added to them.
SETS = ("modules_to_save", "bias", "trainable_token_indices")


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
    carried: list[str] = []  # files of the model that stand beside the weights as they were
    licence: Licence = {}  # of the original: what its card says, or the file that holds it


def merge(
    model: str,
    adapters: list[str] | str,
    out: Path | str,
    *,
    weight: list[float] | None = None,
    recompress: bool = False,
    adapter_rank: int | None = None,
    moments: Path | None = None,
    dequantize: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Merge:
    """Merge LoRA adapters, and write the model, or with ``adapter_rank`` one adapter.

    Args:
        weight: how much each adapter counts; 1 each by default.
        recompress: bring each factored layer back to the rank that it had.
        adapter_rank: a budget: as many numbers as this rank in every adapted layer would take, spent where they count most.
        dequantize: turn weights of the model that are quantized already into ordinary ones.
        moments: of the model's calibration: what is left out is measured in their metric.

    Raises:
        TwofoldError: if an adapter does not belong to the model, or the settings do not fit.
    """
    adapters = [adapters] if isinstance(adapters, str) else adapters
    weight = weight or [1.0] * len(adapters)
    if len(weight) != len(adapters):
        raise TwofoldError(
            f"there are {len(adapters)} adapters and {len(weight)} values of `weight`; give one for each"
        )
    if recompress and adapter_rank is not None:
        raise TwofoldError("give either `recompress` or `adapter_rank`")
    out = Path(out).expanduser().resolve()
    check_output(out, overwrite)
    loaded = load_model(model, trust_remote_code=trust_remote_code, dequantize=dequantize)
    folders = [Path(adapter).expanduser() for adapter in adapters]
    check_apart(out, [loaded.source, *folders], [moments] if moments is not None else [])
    companions = Companions.of(loaded, WHOLE if adapter_rank is None else [LICENCE])
    record = Merge(
        model=model, adapters=adapters, weights=weight, ranks={},
        base_sha256=loaded.shards.hash("") if loaded.shards is not None else "",
        parameters_before=sum(p.numel() for p in loaded.model.parameters()),
        **companions.record,
    )  # fmt: skip
    adapted: Any = loaded.model
    example = Example.of(loaded.model)
    for number, folder in enumerate(folders):
        adapted = load_adapter(adapted, folder, f"adapter{number}", loaded)
    _check_kinds(adapted, record, adapter_rank is not None)
    metrics = Metrics(moments)
    if adapter_rank is not None:
        layers = _one_adapter(adapted, adapter_rank, metrics, record)
        write = partial(write_adapter, layers=layers, base=str(loaded.source or model), kind=task_type(loaded.model))
    else:
        merged = _one_model(adapted, loaded, metrics if recompress else None, record, example)
        write = partial(_write_model, model=merged, loaded=loaded)
    record.notes += companions.notes
    with staged_folder(out, overwrite) as folder:
        write(folder)
        companions.write(folder)
        (folder / "run.json").write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return record


def _check_kinds(adapted: PeftModel, record: Merge, together: bool) -> None:
    """Refuse what would not be the sum of the adapters.

    Raises:
        TwofoldError: if an adapter is none of weights; if one that sets weights, and adds nothing to them, is scaled, or is DoRA
            and added to another one; if one repeats layers, or two set the same ones; or if one adapter is asked for, of others
            than plain LoRA.
    """
    for name, module in adapted.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and len(module.modules_to_save) > 1:
            both = " and ".join(record.adapters[int(key.removeprefix("adapter"))] for key in module.modules_to_save)
            raise TwofoldError(
                f"{both} each have weights that take the place of {name.removeprefix('base_model.model.')}, which can be one "
                "adapter's alone; merge without the others"
            )
    for number, (path, weight) in enumerate(zip(record.adapters, record.weights, strict=True)):
        config = adapted.peft_config[f"adapter{number}"]
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise TwofoldError(
                f"{path} is of the kind {config.peft_type.value}, which changes no weights, so there is nothing to merge; keep "
                "it beside the model"
            )
        if getattr(config, "layer_replication", None):
            raise TwofoldError(
                f"{path} repeats layers of the model (layer_replication), which stay one weight each, and a checkpoint can't say "
                "that; keep it beside the model"
            )
        dora = getattr(config, "use_dora", False)
        if dora and (weight != 1 or len(record.adapters) > 1):
            raise TwofoldError(
                f"{path} is DoRA, which also sets the length of each weight: it can't count more or less than once, nor be added "
                "to other adapters; merge it alone, without `weight`"
            )
        sets = [name for name in SETS if getattr(config, name, None) not in (None, [], {}, "none")]
        if sets and weight != 1:
            raise TwofoldError(
                f"{path} has {sets[0]}, weights that take the place of the model's: they can't count more or less than once; "
                "leave `weight` out"
            )
        tokens = config.peft_type == PeftType.TRAINABLE_TOKENS or "trainable_token_indices" in sets
        if tokens and len(record.adapters) > 1:
            raise TwofoldError(
                f"{path} trains tokens, which does not go together with other adapters; merge one, and the other "
                "into what is written"
            )
        more = dora or sets or getattr(config, "lora_bias", False) or getattr(config, "target_parameters", None)
        if together and (config.peft_type != PeftType.LORA or more):
            raise TwofoldError(
                f"{path} is no plain LoRA, and `adapter_rank` puts the products of plain LoRA into one adapter; merge it without"
            )


def _one_model(
    adapted: PeftModel, loaded: LoadedModel, metrics: Metrics | None, record: Merge, example: Example | None
) -> Any:
    """Put all adapters into the model, whose factored layers grow by their ranks; with metrics, those are brought back.

    Raises:
        TwofoldError: if adapters can't be merged, or the model would not compute with them what it computes beside them.
    """
    before = _factored(loaded.model)
    columns = [name for name, layer in before.items() if isinstance(layer, DenseColumnsLinear)]
    ranks = {name: layer.rank for name, layer in before.items() if name not in columns}
    weights = {f"adapter{number}": weight for number, weight in enumerate(record.weights)}
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for name in weights.keys() & module.scaling.keys():
                module.scaling[name] *= weights[name]
        elif hasattr(module, "merge") and hasattr(module, "base_layer") and any(w != 1 for w in record.weights):
            raise TwofoldError("only LoRA adapters can count more or less than once; leave `weight` out")
    merged, notes = merged_exactly(adapted, list(weights), loaded, " and ".join(record.adapters), example)
    record.notes += notes
    if metrics is not None:
        recompress_to(merged, ranks, metrics)
        record.notes += [f"{name} has dense columns and keeps its grown rank" for name in columns]
        record.metric = metrics.words
    record.ranks = {name: layer.rank for name, layer in _factored(merged).items()}
    record.parameters_after = sum(p.numel() for p in merged.parameters())
    return merged


@torch.no_grad()
def recompress_to(model: nn.Module, ranks: dict[str, int], metrics: Metrics) -> None:
    """Bring layers whose rank grew back to the rank that they had, with the least loss in the metric.

    Args:
        ranks: by the names that the layers have in the merged model; of layers without dense columns.
    """
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        if isinstance(layer, FactoredLinear) and layer.rank <= rank:
            continue
        stored = next(layer.parameters())
        weight = dense_weight(layer).detach().to(working_dtype(stored.device))
        left, right = metrics.decompose(name, weight)[1](rank)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        transposed = bool(getattr(layer, "transposed", not isinstance(layer, nn.Linear)))
        smaller = FactoredLinear.from_factors(left, right, bias, transposed=transposed, dtype=stored.dtype)
        replace_module(model, name, smaller.requires_grad_(any(p.requires_grad for p in layer.parameters())))
    attach(model)


@torch.no_grad()
def _one_adapter(adapted: PeftModel, rank: int, metrics: Metrics, record: Merge) -> dict[str, tuple[Tensor, Tensor]]:
    """Add all adapters up, and return the factors of one adapter within a budget."""
    changes = Changes()
    for name, module in adapted.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        change: Tensor | None = None
        count = 0
        for number, weight in enumerate(record.weights):
            key = f"adapter{number}"
            if key in module.lora_embedding_A:
                raise TwofoldError(
                    f"{record.adapters[number]} changes the embedding {name}, which one adapter of linear layers does not hold; "
                    "merge it without `adapter_rank`"
                )
            if key not in module.lora_A:
                continue
            if module.lora_variant.get(key) is not None:
                raise TwofoldError(
                    f"{record.adapters[number]} is no plain LoRA, so it can't be put into one adapter; merge it"
                )
            up = module.lora_B[key].weight
            up, down = (matrix.to(working_dtype(up.device)) for matrix in (up, module.lora_A[key].weight))
            part = up @ down * (module.scaling[key] * weight)
            change = part if change is None else change + part
            count += len(down)
        if change is not None and change.any():
            values, factors = metrics.decompose(name, change)
            count = min(count, *change.shape)
            changes.values[name], changes.factors[name] = values[:count].float(), factors(count)
            changes.costs[name] = sum(change.shape)
    if not changes.values:
        raise TwofoldError("the adapters change nothing, so there is nothing to merge")
    record.ranks, record.metric = changes.within(rank), metrics.words
    record.energy, record.parameters_after = changes.energy(record.ranks), changes.numbers(record.ranks)
    return changes.cut(record.ranks)


def _factored(model: Any) -> dict[str, FactoredLinear]:
    """Return the factored layers by their names in the plain model, whether adapters stand on it or not."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear)
    }


def _write_model(folder: Path, model: Any, loaded: LoadedModel) -> None:
    """Write a model in the dtype of its checkpoint."""
    save_like(loaded, model, folder)
