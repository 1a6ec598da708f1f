"""The chain of equal blocks that a Transformer is made of, and how to run a stretch of it alone.

A stretch is run through the model's own ``forward``, so that every block gets the masks, positions and other arguments that its
architecture gives it: the blocks before the stretch hand on what is put in, and the first block after it ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

from twofold.model.stacks import lists_of_blocks, stack_of


@dataclass(frozen=True)
class Chain:
    """The blocks of a model in the order in which they run; each gets the hidden state of the one before."""

    blocks: tuple[str, ...]
    tuples: bool  # a block returns (hidden state, …) and not the hidden state alone

    def __len__(self) -> int:
        return len(self.blocks)

    def block_of(self, name: str) -> int | None:
        """Return the index of the block that holds a module or weight, None if it stands outside of all."""
        return next((i for i, block in enumerate(self.blocks) if name == block or name.startswith(f"{block}.")), None)


@dataclass(frozen=True)
class Stretch:
    """The blocks first … last − 1 of a chain, with what stands before the first and after the last of all.

    Without a chain the model is one stretch of one piece.
    """

    chain: Chain | None = None
    first: int = 0
    last: int = 1

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.chain is None or self.last == len(self.chain)

    def holds(self, name: str, before: frozenset[str]) -> bool:
        """Say whether a module runs in this stretch; ``before`` names those that run before the first block."""
        block = self.chain.block_of(name) if self.chain is not None else None
        if block is not None:
            return self.first <= block < self.last
        return self.is_first if name in before or self.chain is None else self.is_last


def stretches(chain: Chain | None, blocks: int) -> list[Stretch]:
    """Cut a chain into stretches of a number of blocks; if they are not all of one size, the first is the smaller one.

    The last stretch is the only one that a calibration with gradients does not compute twice.
    """
    if chain is None:
        return [Stretch()]
    blocks = max(blocks, 1)
    ends = range(len(chain), 0, -blocks)
    return [Stretch(chain, max(end - blocks, 0), end) for end in reversed(ends)]


class ChainWatch:
    """A record of what a run of the model tells about its blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.names = block_names(model)
        self.stacks = lists_of_blocks(model)
        self.calls: list[tuple[str, Any, Any]] = []  # block, hidden state put in, what came out
        self.called: list[str] = []  # all modules in the order of their calls
        self.crossed = False  # a block gets something else that was made of the embeddings

    def chain(self) -> Chain | None:
        """Return the chain, or None if the blocks do not simply follow one another."""
        if self.crossed or len(self.names) < 2 or [name for name, _, _ in self.calls] != self.names:
            return None
        if len(self.stacks_run()) > 1:
            return None
        kinds = {type(out) for _, _, out in self.calls}
        if len(kinds) != 1 or any(_hidden(out) is None for _, _, out in self.calls):
            return None
        for (_, _, out), (_, hidden, _) in zip(self.calls, self.calls[1:], strict=False):
            if _hidden(out) is not hidden:
                return None
        return Chain(tuple(self.names), isinstance(self.calls[0][2], tuple))

    def stacks_run(self) -> list[str]:
        """Return the stacks that were run, the stages of one as one: a model of text and images needs no images."""
        whole = [stack for stack in self.stacks if not stack_of(stack, self.stacks)]
        return [stack for stack in whole if any(name.startswith(f"{stack}.") for name in self.called)]

    def before(self) -> frozenset[str]:
        """Return the modules that run before the first block."""
        first = next((i for i, name in enumerate(self.called) if name in self.names[:1]), 0)
        return frozenset(self.called[:first])


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the elements of the list of modules that holds the most parameters."""
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            size = sum(p.numel() for p in module.parameters())
            if size > best[0]:
                best = size, [f"{name}.{i}" if name else str(i) for i in range(len(module))]
    return best[1]


def _hidden(output: Any) -> Tensor | None:
    """Return the hidden state in a block's output; None if it returns more that later blocks could need."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return None if any(isinstance(rest, Tensor) for rest in output[1:]) else output[0]
    return None


def has_two_stacks(model: Any) -> bool:
    """Say whether a model, or what a configuration describes, has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", model), "is_encoder_decoder", False))


def read_at_once(model: Any) -> tuple[str, ...]:
    """Return what the names of layers begin with that are given a whole input at once, and never one token after another.

    They are those of a model that writes nothing, of an encoder, and of a tower for images or sound.
    """
    if not getattr(model, "can_generate", lambda: False)():
        return ("",)
    if has_two_stacks(model):
        encoder = model.get_encoder()
        return tuple(f"{name}." for name, module in model.named_modules() if module is encoder)
    towers = [
        f"{name}."
        for name, module in model.named_modules()
        if name and getattr(module, "main_input_name", "input_ids") != "input_ids" and not hasattr(module, "lm_head")
    ]
    return tuple(towers)


def body_of(model: Any) -> Any:
    """Return the model without its head; the model itself if it has none."""
    return getattr(model, str(getattr(model, "base_model_prefix", "")) or "", model)


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect in the list the hidden states that a module gives within the block."""
    states: list[Tensor] = []
    with module.register_forward_hook(lambda m, a, out: states.append(out if isinstance(out, Tensor) else out[0])):
        yield states


def plain_chain(model: nn.Module) -> Chain:
    """Return the blocks of all stacks of a model by their names alone, to do work in parts; it says nothing of how they run."""
    lists = lists_of_blocks(model)
    stacks = [stack for stack in lists if not any(stack_of(other, [stack]) for other in lists)]  # a stage is one
    names = [f"{stack}.{i}" for stack in stacks for i, _ in model.get_submodule(stack).named_children()]
    return Chain(tuple(names if len(stacks) > 1 else block_names(model)), False)


@contextmanager
def watch_chain(model: nn.Module) -> Iterator[ChainWatch]:
    """Watch the runs of the model within the block.

    If its embeddings' output is the one thing that requires a gradient, what else is made of it is seen.
    """
    watch = ChainWatch(model)

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        watch.called.append(name)

    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        watch.calls.append((name, hidden, output))
        # A cache is filled in passing, whether or not an exporter has registered it as a tree of tensors.
        leaves = tree_leaves((args[1:], kwargs), is_leaf=lambda x: isinstance(x, Cache))
        watch.crossed |= any(t.requires_grad for t in leaves if isinstance(t, Tensor) and t is not hidden)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(before, name)))
        for name in watch.names:
            block = model.get_submodule(name)
            hooks.enter_context(block.register_forward_hook(partial(after, name), with_kwargs=True))
        yield watch


class _Found(Exception):  # noqa: N818, it is no error
    """Ends a run that has come to the input that it was for; a stretch may be run for it, so it is not ``_Stop``."""


class _Stop(Exception):  # noqa: N818, it is no error
    """Ends a run that has come to the end of its stretch."""


def input_before(module: nn.Module, run: Callable[[], object]) -> Tensor | None:
    """Return a module's first input, with its graph, without running it or what follows; None if it is not called."""

    def find(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            raise _Found(args[0])

    try:
        with module.register_forward_pre_hook(find):
            run()
    except _Found as stopped:
        return stopped.args[0]  # type: ignore[no-any-return]
    return None


@contextmanager
def replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else within the block."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def run_stretch(
    run: Callable[[], Any],
    model: Any,
    stretch: Stretch,
    hidden: Tensor | None,  # (batch, length, width), what goes into the first block; None for the first stretch
) -> Any:
    """Run the model on one stretch.

    Args:
        run: runs the whole model on the batch of token ids that ``hidden`` belongs to.

    Returns:
        The hidden state after the stretch, or the model's output if the stretch is the last.
    """
    chain = stretch.chain
    if chain is None or (stretch.is_first and stretch.is_last and hidden is None):
        return run()

    def given(*args: Any, **kwargs: Any) -> Any:
        return (hidden,) if chain.tuples else hidden

    def zeros(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert hidden is not None
        width = int(getattr(embedding, "embedding_dim", hidden.shape[-1]))
        return torch.zeros(*ids.shape, width, dtype=hidden.dtype, device=hidden.device)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Stop(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        for name in chain.blocks[: stretch.first]:
            stack.enter_context(replaced_forward(model.get_submodule(name), given))
        if stretch.first > 0:  # embeddings are not used, so that their table need not be in memory
            embedding = model.get_input_embeddings()
            stack.enter_context(replaced_forward(embedding, zeros))
        if not stretch.is_last:
            stack.enter_context(replaced_forward(model.get_submodule(chain.blocks[stretch.last]), stop))
        try:
            return run()
        except _Stop as stopped:
            return stopped.args[0]
