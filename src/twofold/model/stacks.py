"""The stacks of blocks in a model: a decoder is one; encoder and decoder, or towers for text and for images, are two.

A stack is a list of blocks, and its name is what stands before their numbers: ``model.encoder.layers``. The stages of a model
whose width grows, as Swin's, each hold a stack: ``encoder.layers.0.blocks``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from twofold.nn.compact import Compact

Lists = (nn.ModuleList, nn.Sequential)


def lists_of_blocks(model: nn.Module) -> list[str]:
    """Return the names of the lists whose elements are blocks, in the order of the model; a stage stands before its stack."""
    lists: list[str] = []

    def look(name: str, module: nn.Module) -> None:
        for leaf, child in module.named_children():
            place = f"{name}.{leaf}" if name else leaf
            if not _holds_blocks(child):
                look(place, child)
                continue
            lists.append(place)
            for number, block in child.named_children():
                lists.extend(f"{place}.{number}{inner}" for inner in _stack_within(block))

    look("", model)
    return lists


def stacks_of(model: nn.Module, weights: Iterable[str]) -> tuple[str, ...]:
    """Return the stacks that some modules stand in, in the order of the model; nothing if it is one.

    Args:
        weights: the names of the modules.
    """
    lists = lists_of_blocks(model)
    used = {stack_of(name, lists) for name in weights}
    stacks = tuple(name for name in lists if name in used)
    return stacks if len(stacks) > 1 else ()


def stack_of(name: str, stacks: Iterable[str]) -> str:
    """Return the innermost stack that a module or weight stands in; "" if it stands in none."""
    return max((stack for stack in stacks if name.startswith(f"{stack}.")), key=len, default="")


def stack_labels(stacks: Iterable[str]) -> dict[str, str]:
    """Return short names of stacks: the parts of each that tell it from others.

    >>> stack_labels(["model.encoder.layers", "model.decoder.layers"])
    {'model.encoder.layers': 'encoder', 'model.decoder.layers': 'decoder'}
    """
    paths = {stack: stack.split(".") for stack in stacks}

    def telling(path: list[str]) -> list[str]:
        """Return the parts at which another stack goes another way."""
        return [
            part
            for i, part in enumerate(path)
            if len({tuple(other[i : i + 1]) for other in paths.values() if other[:i] == path[:i]}) > 1
        ]

    return {stack: ".".join(telling(path)) for stack, path in paths.items()}


def stack_words(stacks: Iterable[str]) -> dict[str, str]:
    """Return what stands before the kinds of weights of each stack; the stages of one are told apart by their blocks alone."""
    return {
        stack: " ".join(part for part in label.split(".") if not part.isdigit())
        for stack, label in stack_labels(stacks).items()
    }


def _holds_blocks(module: nn.Module) -> bool:
    """Say whether a module is a list of blocks: modules that are made of attention, MLP and so on; a sequence of one class."""
    if not isinstance(module, Lists) or len(module) == 0 or not all(map(_is_block, module)):
        return False
    return isinstance(module, nn.ModuleList) or len({type(element) for element in module}) == 1


def _is_block(module: nn.Module) -> bool:
    """Say whether a module has parts that have parts; a layer that is factorized counts as one."""
    parts = [part for part in module.children() if not isinstance(part, Compact)]
    return not isinstance(module, Compact) and any(True for part in parts for _ in part.children())


def _stack_within(stage: nn.Module) -> list[str]:
    """Return what stands behind a stage's name in that of its stack, if it is one: a list that is most of it.

    The experts of a block, which stand deeper, and what one is made of (T5 lists attention and MLP) are no blocks.
    """
    children: list[tuple[str, Any]] = [("", stage), *((f".{leaf}", child) for leaf, child in stage.named_children())]
    inner = [(leaf, c) for leaf, c in children if _holds_blocks(c) and len({type(element) for element in c}) == 1]
    return [leaf for leaf, child in inner if 2 * _size(child) > _size(stage)][:1]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
