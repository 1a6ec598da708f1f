"""Adapters merged into a model as it computes with them beside it, or not at all."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from twofold.checkpoint.ties import FLAG, rounding_apart, settle_ties, tie, tied_names
from twofold.errors import TwofoldError
from twofold.host.faults import errors_in_words
from twofold.host.quiet import first_line
from twofold.model.load import LoadedModel
from twofold.task import Batch, Task, find_task, on_device

# Of the outputs, relative: a mistake changes them by their own size.
ROUNDING = {torch.float64: 1e-5, torch.float32: 5e-3}
ROUNDING_NARROW = 0.2


@dataclass(frozen=True)
class Example:
    """A small batch that a model runs on, made before adapters stand on it."""

    task: Task
    batch: Batch

    @classmethod
    def of(cls, model: Any) -> Example | None:
        """Return a batch for a model; None if it is for no task that is known."""
        task = find_task(model)
        return None if task is None else cls(task, on_device(task.example(model), model.device, model.dtype))

    @torch.no_grad()
    def outputs(self, model: Any) -> Tensor | None:
        """Run the model, with adapters or without; None if it does not run on the batch."""
        try:
            output = self.task.call(model.eval(), self.batch)
        except TwofoldError:
            return None
        logits = getattr(output, "logits", None)
        return (logits if isinstance(logits, Tensor) else output[0]).double()


def merged_exactly(
    adapted: PeftModel, names: list[str], loaded: LoadedModel, which: str, example: Example | None
) -> tuple[Any, list[str]]:
    """Merge adapters, each of which counts where it stands: a weight that its layer shared with another is its own then.

    Args:
        names: of the adapters, in the model.
        which: the adapters, as the user named them.
        example: that both are run on, for a comparison.

    Returns:
        The model, and what there is to say of it.

    Raises:
        TwofoldError: if they do not go together, or the model would compute something else.
    """
    model: Any = adapted.get_base_model()
    flag = getattr(model.config, FLAG, None)
    with (
        errors_in_words(lambda error: f"{which} can't be merged into {loaded.name}: {first_line(error)}", _not_of_peft),
        warnings.catch_warnings(),  # of ties, which are looked after here
    ):
        warnings.simplefilter("ignore")
        adapted.base_model.set_adapter(names)  # PEFT merges of modules_to_save what is active, and only that
        meant = example.outputs(adapted) if example is not None else None
        tied = tied_names(model)
        _part_from_others(model)
        merged = adapted.merge_and_unload(adapter_names=names)
    if flag is not None:
        setattr(merged.config, FLAG, flag)  # PEFT's answer is of the two embeddings alone
    tie(merged, rounding_apart(merged, tied))
    note = settle_ties(merged)
    got = example.outputs(merged) if example is not None else None
    if meant is not None:
        apart = float("inf") if got is None else float((got - meant).norm() / meant.norm().clamp_min(1e-30))
        if not apart <= ROUNDING.get(loaded.residence.dtype, ROUNDING_NARROW):
            raise TwofoldError(
                f"with {which} merged, {loaded.name} computes something else than with it beside (the logits differ by "
                f"{apart:.1e}, relative); keep it beside the model"
            )
    return merged, [] if note is None else [note]


def _not_of_peft(error: Exception) -> bool:
    """Say whether an error was raised by other code than PEFT's, which refuses what does not go together."""
    return not extract_tb(error.__traceback__)[-1].filename.startswith(str(Path(peft.__file__).parent))


def _part_from_others(model: nn.Module) -> None:
    """Give each weight that an adapter changes, and other layers use too, to its own layer alone."""
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            for leaf, parameter in list(layer.named_parameters(recurse=False)):
                if holders.get(id(parameter), 0) > 1:
                    setattr(layer, leaf, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
