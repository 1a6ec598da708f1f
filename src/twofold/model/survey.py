"""What a run without weights tells of a model: its chain of blocks, and which weights share an input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from twofold.host.faults import models_errors
from twofold.host.quiet import first_line, quiet_bars
from twofold.model.blocks import Chain, watch_chain
from twofold.model.load import LoadedModel
from twofold.model.stacks import stack_labels
from twofold.model.target import Target
from twofold.model.weights import find_groups


@dataclass(frozen=True)
class Survey:
    """The findings of a run without weights."""

    chain: Chain | None
    before: frozenset[str]  # modules that run before the first block
    groups: dict[str, str]  # target → the first target with the same input
    stacks: tuple[str, ...] = ()  # that were run, by their labels


def survey(loaded: LoadedModel, targets: list[Target], example: Mapping[str, Tensor]) -> Survey:
    """Survey a model by a run of one of its configuration whose tensors have shapes but no numbers.

    Args:
        example: a small batch, as arguments of the model's forward.

    Raises:
        TwofoldError: if it does not run that way.
    """

    def words(error: Exception) -> str:
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            return f"what {type(loaded.model).__name__} computes depends on numbers that a run without weights does not have"
        return f"{type(loaded.model).__name__} can't be run block by block ({first_line(error)})"

    # An architecture that needs other inputs, or looks at its numbers, fails in its own way.
    with models_errors(words), quiet_bars(), FakeTensorMode():
        # In bfloat16, the one dtype that every kernel of an expert layer takes.
        model = type(loaded.model)._from_config(loaded.model.config, dtype=torch.bfloat16).eval()
        batch = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in example.items()}
        groups = find_groups(model, targets, lambda: model(**batch))
        model.requires_grad_(False)
        marked = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))
        with marked, watch_chain(model) as watch, torch.enable_grad():
            model(**batch)
    stacks = tuple(stack_labels(watch.stacks_run()).values())
    return Survey(watch.chain(), watch.before(), groups, stacks)
