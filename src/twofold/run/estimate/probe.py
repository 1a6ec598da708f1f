"""How fast this machine does the parts of a run: one block forward and backward, one weight decomposed, some bytes read."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from twofold.calibrate.accumulate import Accumulator
from twofold.calibrate.opened import Opened
from twofold.calibrate.request import Request, request_statistics
from twofold.calibrate.statistics import BACKWARD, FORWARD
from twofold.decompose.decompose import BATCH, BATCH_NUMBERS
from twofold.linalg.gauge import gauge_rank
from twofold.linalg.spectrum import gram, smaller_side, spectrum_of, truncate, truncation_loss
from twofold.model.blocks import Chain, Stretch, body_of, run_stretch
from twofold.model.skeleton import empty_model
from twofold.model.streamed import Resident
from twofold.model.target import Target
from twofold.nn.layers.factored import FactoredLinear
from twofold.objectives import OBJECTIVES
from twofold.recipe import Recipe
from twofold.settings.price import Speeds
from twofold.task.output.categorical import CATEGORICAL

LARGEST_BLOCK = 300_000_000  # numbers of a block that is tried as it is
LARGEST_SIDE = 768  # of a weight that is decomposed as it is; larger ones are told from one of this side
GROWTH = 2.8  # the power of its side with which the time of a decomposition grows
TRIES = 3


def _median(run: Callable[[], Any], tries: int = TRIES) -> float:
    """Return the median of the seconds that a run takes, after one that warms up."""
    run()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def probe(
    opened: Opened, chain: Chain | None, targets: list[Target], groups: dict[str, str], recipe: Recipe, table: int
) -> Speeds:
    """Try the parts of a run on random numbers; takes some seconds.

    Args:
        opened: the model without weights.
        targets: of one block.
        table: numbers of the output head.
    """
    needs, batch = OBJECTIVES.get(recipe.objective).needs, recipe.batch_size * recipe.window
    request = request_statistics(targets, groups, needs)
    vocabulary = int(getattr(opened.loaded.model.config.get_text_config(), "vocab_size", 0) or 0)
    forward = both = head = head_forward = 0.0
    size = sum(target.size for target in targets)
    if needs or recipe.eval_windows:
        if chain is not None and len(chain) > 1 and size < LARGEST_BLOCK:
            forward, both = _block(opened, chain, targets, request, recipe)
        else:
            forward, both = _products(size, batch, request.numbers)
        head, head_forward = _head(table, vocabulary, batch, recipe.window)
    decomposed, factored = _decomposed(targets, bool(needs))
    return Speeds(forward, both, head, head_forward, decomposed, factored, batch)


def _block(
    opened: Opened, chain: Chain, targets: list[Target], request: Request, recipe: Recipe
) -> tuple[float, float]:
    """Time one block of the model itself, filled with random numbers: forward, and forward and backward."""
    whole, task = opened.loaded.model, opened.need_task()
    model = empty_model(type(whole), copy.deepcopy(whole.config), torch.float32)
    index = chain.block_of(targets[0].name) or 1
    name = chain.blocks[index]
    tables = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    for path, module in model.named_modules():
        block = chain.block_of(path)
        if module in tables or (block is not None and block != index):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.randn(parameter.shape) * 0.02 if parameter.dim() > 1 else torch.ones(parameter.shape)
                module._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    original = chain.blocks[chain.block_of(targets[0].name) or 0]
    moved = [replace(target, name=name + target.name.removeprefix(original)) for target in targets]
    renamed = {
        kind: {name + key.removeprefix(original): k for key, k in owners.items()}
        for kind, owners in request.sizes.items()
    }
    residence, body = Resident(model, torch.float32, torch.device("cpu")), body_of(model)
    batch = {
        name: torch.zeros(recipe.batch_size, recipe.window, dtype=tensor.dtype) if tensor.dim() == 2 else tensor
        for name, tensor in task.example(model).items()
    }
    width = int(getattr(model.config.get_text_config(), "hidden_size", 0) or tables[0].weight.shape[-1])
    hidden = torch.randn(recipe.batch_size, recipe.window, width)
    stretch = Stretch(chain, index, index + 1)

    def run(backward: bool) -> None:
        states = hidden.clone().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            out = run_stretch(lambda: task.call(body, batch), model, stretch, states)
            out = out if isinstance(out, Tensor) else out[0]
            if backward:
                out.backward(hidden)

    def timed(kinds: tuple[str, ...], backward: bool) -> float:
        accumulator = Accumulator(residence, moved, Request(renamed), kinds, {})
        try:
            return _median(lambda: run(backward))
        finally:
            accumulator.remove()

    forward = timed(FORWARD, False)
    return forward, timed(FORWARD + BACKWARD, True) if request.backward else forward


def _products(block: int, batch: int, moments: int) -> tuple[float, float]:
    """Tell the times of a block from one product, where it is too large to try, or the model has no blocks."""
    side = 1024
    a, b = torch.randn(256, side), torch.randn(side, side)
    rate = 256 * side * side / _median(lambda: a @ b)  # multiplications a second
    return 1.25 * batch * (block + moments / 2) / rate, 1.25 * batch * (2 * block + moments) / rate


def _head(table: int, vocabulary: int, batch: int, window: int) -> tuple[float, float]:
    """Time logits, sampled labels and their gradient on a batch, and logits and labels on a window."""
    if table == 0 or vocabulary == 0:
        return 0.0, 0.0
    width = max(table // vocabulary, 1)
    rows, part = min(batch, 128), min(vocabulary, 16384)
    x, weight = torch.randn(rows, width), torch.randn(part, width)
    product = _median(lambda: x @ weight.T) * vocabulary / part / rows
    logits = torch.randn(rows, vocabulary)
    generator = torch.Generator().manual_seed(0)
    labels = _median(lambda: CATEGORICAL.probe(logits, None, generator)) / rows
    return batch * (2 * product + labels), window * (product + labels)


def _decomposed(targets: list[Target], full: bool) -> tuple[float, float]:
    """Time the weights of one block decomposed and factored, shape by shape."""
    decomposed = factored = 0.0
    for (m, n), count in Counter((target.out_features, target.in_features) for target in targets).items():
        scale = max(min(m, n) / LARGEST_SIDE, 1.0)
        decomposing, factoring = _one_weight(max(round(m / scale), 1), max(round(n / scale), 1), full, count)
        decomposed += decomposing * count * scale**GROWTH
        factored += factoring * count * scale**GROWTH
    return decomposed, factored


def _one_weight(m: int, n: int, full: bool, count: int) -> tuple[float, float]:
    """Time one weight (m, n) of a count of its shape, decomposed and factored."""
    generator = torch.Generator().manual_seed(0)
    k, p = min(m, n), max(m, n)
    weight = torch.randn(m, n, generator=generator).double()
    root = torch.randn(k, k, generator=generator).double()
    metric = root @ root.T / k + torch.eye(k).double() if full else None
    together = max(1, min(BATCH, BATCH_NUMBERS // k**2, count))
    side = smaller_side(m, n)
    matrix = gram(weight, None)
    spectrum = spectrum_of(metric, matrix, side)
    rank = max(gauge_rank(m, n, 0.6 * m * n), 1)

    def decomposing() -> None:
        stacked = None if metric is None else torch.stack([metric + i for i in range(together)])
        spectrum_of(stacked, torch.stack([gram(weight, None) for _ in range(together)]), side)

    def factoring() -> None:
        gram(weight, None)
        left, right = truncate(weight, spectrum, metric, rank)
        layer = FactoredLinear.from_factors(left, right, None, "auto", False, dtype=torch.float32)
        truncation_loss(weight, layer.to_dense(torch.float64), metric, matrix)

    tries = 1 if k * k * p > 10**8 else TRIES
    return _median(decomposing, tries) / together, _median(factoring, tries)
