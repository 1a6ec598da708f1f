"""The one verb: a model with factored layers in the form that it runs fastest in, in memory alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twofold.checkpoint.plugin import METHOD, TwofoldQuantizer
from twofold.errors import TwofoldError
from twofold.host.progress import say
from twofold.inference.draft import Draft, why_not
from twofold.inference.latency import DECODE, PREFILL, Latencies, StoredForm
from twofold.inference.neighbours import Pairs, called_in_turn, find_pairs, first_on_rows, fold
from twofold.model.bare import check_unwrapped
from twofold.model.blocks import read_at_once
from twofold.model.target import Target
from twofold.model.weights import find_groups
from twofold.nn.compact import CompactLinear
from twofold.nn.grouped_linear import ColumnsLinear, GroupedLinear, InputGroup, Part
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.places import replace_module
from twofold.task import find_task, on_device

# Of the outputs, relative: what stops a mistake of ours, as a wrong order, which changes them by their own size. A deep model
# amplifies the rounding of its layers, and norms are taken in float32 whatever the dtype.
ROUNDING = {torch.float64: 1e-5, torch.float32: 5e-3}
ROUNDING_NARROW = 0.2


@dataclass
class Optimized:
    """What ``optimize`` did: each factored layer is in one of these, ``folded`` apart."""

    groups: list[list[str]] = field(default_factory=list)  # layers whose right factors are one product
    alone: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)  # layers whose outputs are used in the order that they come in
    merged: dict[str, str] = field(default_factory=dict)  # dense in memory, and the measured times
    kept: dict[str, str] = field(default_factory=dict)  # as they were, and why
    notes: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """Say what was done, in one sentence."""
        joined = sum(len(group) for group in self.groups)
        parts = [f"{joined} layers in {len(self.groups)} groups that read one input", f"{len(self.alone)} alone"]
        parts += [f"{len(self.folded)} outputs with no order to keep"] if self.folded else []
        parts += [f"{len(self.merged)} dense in memory, where that was measured to be faster"] if self.merged else []
        parts += [f"{len(self.kept)} as they were"] if self.kept else []
        return f"inference form: {', '.join(parts)}"


class OptimizedQuantizer(TwofoldQuantizer):
    """Refuses to save, or to make dense, what is for running alone."""

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        raise TwofoldError(
            "this model is in its inference form, which is not stored: save it before twofold.optimize, or load the factored "
            "checkpoint again and save that"
        )

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        raise TwofoldError(
            "this model is in its inference form, which has no way back; load the factored checkpoint again and dequantize that"
        )


@torch.no_grad()
def optimize(
    model: Any,
    *,
    merge: Literal["measured", "never"] = "measured",
    latencies: Latencies | None = None,
    quiet: bool = False,
) -> Any:
    """Put a factored model into the form that it runs fastest in, in place; its logits change by rounding alone.

    Weights that read one input get one product for their right factors, outputs are ordered once or not at all, and layers whose
    factors are measured slower than the dense product, for one token or for many, are dense in memory; for many alone where a
    layer never reads one token, as an encoder's. The form is for running: it is not saved (``save_pretrained`` says so), not
    trained, and not exported.

    Args:
        model: a transformers model with ``FactoredLinear`` layers; one without any is given back as it is.
        merge: "measured" makes slower layers dense (it takes memory, and is said), "never" leaves all factored.
        latencies: the measured times of this machine; by default those in the cache, and what they lack is measured now.

    Returns:
        The model. ``model.twofold_inference`` says what was done.

    Raises:
        TwofoldError: if it is in this form already, or has no weights.
        RuntimeError: if the logits changed by more than rounding; then the model is as it was.
    """
    if isinstance(getattr(model, "twofold_inference", None), Optimized):
        raise TwofoldError("this model is in its inference form already")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CompactLinear)}
    done = Optimized()
    if not layers:
        done.notes.append("the model has no factored layers, so nothing was changed")
        return model
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TwofoldError("this model has no weights yet, so it can't be put into its inference form; load it first")
    check_unwrapped(model)
    model.eval()
    done.kept = {name: reason for name, layer in layers.items() if (reason := why_not(layer)) is not None}
    free: dict[str, Any] = {name: layer for name, layer in layers.items() if name not in done.kept}
    if free:
        first = next(iter(free.values())).reduce.weight
        latencies = latencies or Latencies.of_this_machine(first.dtype, first.device, quiet=quiet)
        run, before = _runner(model, done)
        at_once = read_at_once(model)
        drafts = {name: _draft(layer, name.startswith(at_once)) for name, layer in free.items()}
        shapes = {name: draft.shape for name, draft in drafts.items()}
        pairs = [] if run is None else find_pairs(model, shapes, run)
        modules = _merged(free, drafts, pairs, at_once, done, latencies) if merge == "measured" else {}
        drafts = {name: draft for name, draft in drafts.items() if name not in modules}
        pairs = [(makers, reader) for makers, reader in pairs if drafts.keys() >= {*makers, reader}]
        modules |= _grouped(model, drafts, pairs, run, done, latencies.by_columns)
        _install(model, modules, run, before)
    model.twofold_inference = done
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, TwofoldQuantizer):
        model.hf_quantizer = OptimizedQuantizer(quantizer.quantization_config)
        assert model.quantization_method == METHOD
    if not quiet:
        say(done.words)
    return model


def _draft(layer: FactoredLinear, at_once: bool) -> Draft:
    """Return the draft of a layer; for many tokens, with the pivots on the narrower side, which is put in order."""
    draft = Draft.of(layer)
    if at_once and draft.form == "columns" and draft.in_features > draft.out_features:
        return draft.on_rows() or draft
    return draft


def _merged(
    free: Mapping[str, FactoredLinear],
    drafts: Mapping[str, Draft],
    pairs: Pairs,
    at_once: tuple[str, ...],
    done: Optimized,
    latencies: Latencies,
) -> dict[str, nn.Module]:
    """Make the layers dense that are slower as they are, for what they are called with.

    Args:
        pairs: the makers of hidden units, and their readers; one maker of each has no order to keep.
        at_once: what the names of layers begin with that never read one token.
    """
    unordered = {  # each with the others that must agree to its order
        first: {*makers, reader} - {first}
        for makers, reader in pairs
        if (first := first_on_rows(drafts, makers)) is not None and first.startswith(at_once)
    }
    columns = [name for name, draft in drafts.items() if draft.form == "columns" and name.startswith(at_once)]
    slower: dict[str, str] = {}

    def judge(names: Iterable[str], tokens: int, form: StoredForm = "gauge") -> None:
        shapes = {name: drafts[name].shape for name in names if name not in slower}
        latencies.measure(shapes.values(), form, [tokens])
        for name, (m, n) in shapes.items():
            words = latencies.slower(m, n, len(drafts[name].reduce), form, [tokens])
            if words is not None:
                slower[name] = words

    judge([name for name in drafts if not name.startswith(at_once)], DECODE)
    judge([name for name in drafts if name not in unordered and name not in columns], PREFILL)
    judge(columns, PREFILL, "columns")
    judge(unordered, PREFILL, "unordered")
    judge([first for first, others in unordered.items() if others & slower.keys()], PREFILL)
    done.merged |= {name: slower[name] for name in drafts if name in slower}
    return {name: free[name].dense_module().requires_grad_(False) for name in done.merged}


def _runner(model: Any, done: Optimized) -> tuple[Callable[[], Tensor] | None, Any]:
    """Return a function that runs the model on a small batch, and what it gives; None if the model does not run."""
    task = find_task(model)
    if task is None:
        done.notes.append("the model is for no task that is known, so each layer stands alone")
        return None, None
    batch = on_device(task.example(model), next(model.parameters()).device, getattr(model, "dtype", None))

    def run() -> Tensor:
        output = task.call(model, batch)
        logits = getattr(output, "logits", None)
        first: Tensor = logits if isinstance(logits, Tensor) else output[0]
        return first.clone()

    try:
        return run, run()
    except TwofoldError as error:
        done.notes.append(f"{error}, so each layer stands alone")
        return None, None


def _grouped(
    model: nn.Module,
    drafts: dict[str, Draft],
    pairs: Pairs,
    run: Callable[[], object] | None,
    done: Optimized,
    by_columns: bool,
) -> dict[str, nn.Module]:
    """Make groups of the layers that read one input, and give hidden units an order that costs nothing."""
    if run is not None:
        targets = [Target(name, *d.shape, d.bias is not None, False) for name, d in drafts.items()]
        leaders = find_groups(model, targets, run)
        together: dict[str, list[str]] = {}
        for name in called_in_turn(model, list(drafts), run):
            together.setdefault(leaders[name], []).append(name)
        for names in together.values():
            on_rows = {name: drafts[name].on_rows() for name in names} if len(names) > 1 else {}
            members = {name: draft for name, draft in on_rows.items() if draft is not None}
            if len(members) > 1:
                drafts.update(members)
                done.groups.append(list(members))
        done.folded = [first for pair in pairs if (first := fold(drafts, *pair)) is not None]
    done.alone = [name for name in drafts if not any(name in group for group in done.groups)]
    modules: dict[str, nn.Module] = {}
    for names in [*done.groups, *([name] for name in done.alone)]:
        members = {name: drafts[name].in_rising_order() for name in names}
        d = members[names[0]]
        if d.form == "columns":
            modules[names[0]] = ColumnsLinear(d.reduce, d.expand, d.order, d.bias, by_columns)
            continue
        loose = next((name for name, d in members.items() if d.in_order), None)
        parts = [
            Part(d.reduce, d.expand, d.form == "rows", None if name == loose else d.order, d.bias)
            for name, d in members.items()
        ]
        group = InputGroup(parts, by_columns)
        for i, (name, d) in enumerate(members.items()):
            modules[name] = GroupedLinear(group, i, d.out_features, holds=i == 0)
    return modules


def _install(model: nn.Module, modules: Mapping[str, nn.Module], run: Callable[[], Tensor] | None, before: Any) -> None:
    """Put the layers in their places, and make sure that the model still says the same.

    Raises:
        RuntimeError: if not; the model is as it was.
    """
    replaced: dict[str, nn.Module] = {}
    try:
        for name, module in modules.items():
            replaced[name] = replace_module(model, name, module)
        if run is None:
            return
        after, before = run(), before.double()
        apart = float((after.double() - before).norm() / before.norm().clamp_min(1e-30))
        if not apart <= ROUNDING.get(after.dtype, ROUNDING_NARROW):
            raise RuntimeError(f"the inference form changed the outputs by {apart:.1e}, relative; please report this")
    except BaseException:
        for name, module in replaced.items():
            replace_module(model, name, module)
        raise
