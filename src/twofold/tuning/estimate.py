"""What a fine-tuning will take, before any work: peak memory from the tensors that it keeps, time from the speed of a product.

The model is run once with tensors that have shapes and no numbers, and what its backward pass would need is counted: each storage
once, and no weight. So the count holds for any architecture and method.
"""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import pydantic
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from twofold.errors import TwofoldError
from twofold.host.clock import peak_memory
from twofold.host.faults import models_errors
from twofold.host.quiet import first_line, quiet_bars
from twofold.model.load import load_skeleton
from twofold.model.source import choose_device, compute_dtype
from twofold.nn.compact import CompactLinear
from twofold.nn.int_matrix import IntMatrix
from twofold.task.output.distillation import ROWS
from twofold.tuning.head import POSITIONS, plain_head
from twofold.tuning.methods import adapter_config, check_method, free_factors
from twofold.tuning.optimizers import state_numbers
from twofold.tuning.settings import TuneSettings

VOCABULARY_TILE = 32_768  # of TRL's head: logits are made for so many tokens of the vocabulary at a time
TILES = 8  # such tiles that are in memory at once, in the backward pass
SPARE = 0.5  # of the activations: 0.3 to 0.8 measured on SmolLM2-135M at 256 and 512 tokens, lora and full
PROBE_SECONDS = 0.1
EFFICIENCY = 0.6  # of a training step, against the bare product of matrices


class TuneEstimate(pydantic.BaseModel, extra="forbid"):
    """Peak memory in bytes, and where it goes; time in seconds."""

    method: str
    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool
    tokens: int  # in memory at once
    program: int  # Python and its libraries
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int  # logits, in tiles
    spare: int  # what comes and goes within a layer, and what the allocator holds
    trainable: int  # numbers
    parameters: int
    step_seconds: float
    steps: int
    seconds: float

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def memory(self) -> int:
        """Return the peak resident memory."""
        return self.program + self.weights + self.gradients + self.optimizer + self.activations + self.head + self.spare


def estimate(
    settings: TuneSettings, *, longest: int, mean: float, steps: int, speed: float | None = None
) -> TuneEstimate:
    """Estimate what a run with these settings takes.

    Args:
        longest: tokens of the longest row or packed window.
        mean: tokens of a row or window on average.
        speed: multiplications and additions in a second; measured if it is None.

    Raises:
        TwofoldError: if there is no such model, or the method can't train it.
    """
    how = settings.model_dump(include={"trust_remote_code", "dequantize"})
    skeleton = load_skeleton(settings.model, **how)
    names = check_method(skeleton.model, settings)
    device = choose_device(settings.device)
    dtype = compute_dtype(settings.dtype, skeleton.stored_dtype, device)
    tokens = settings.micro_batch * longest
    with models_errors(
        lambda error: f"{settings.model} can't be estimated ({first_line(error)}); run without `memory` and `dry_run`"
    ):
        ready = _ready(skeleton.model.train(), settings, names)
        with quiet_bars(), FakeTensorMode(allow_non_fake_inputs=True):
            _give_shapes(ready, dtype)
            activations = kept_for_backward(ready, settings.micro_batch, longest)
    trainable = _trainable(settings, ready)
    integers = [m for m in ready.modules() if isinstance(m, IntMatrix)]
    unpacked = max((m.numbers for m in integers), default=0) * dtype.itemsize  # layer by layer
    item = 4 if settings.method not in ("full", "factors") else dtype.itemsize
    config = skeleton.model.config.get_text_config()
    width, depth = getattr(config, "hidden_size", 1024), getattr(config, "num_hidden_layers", 1)
    if settings.gradient_checkpointing:
        activations = tokens * width * dtype.itemsize * depth + activations // max(depth, 1)
    vocabulary = getattr(config, "vocab_size", 32_000)
    accumulation = settings.batch // settings.micro_batch
    passes = (3.0 if settings.method == "full" else 2.0) + settings.gradient_checkpointing
    products = 2.0 * _linear(ready) * mean * settings.micro_batch * passes
    products += 2.0 * vocabulary * width * mean * settings.micro_batch * 3
    seconds = products * accumulation / ((speed or product_speed(device)) * EFFICIENCY) + trainable * 12 * 2 / 5e9
    return TuneEstimate(
        method=settings.method,
        micro_batch=settings.micro_batch,
        accumulation=accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        tokens=tokens,
        program=peak_memory() if device.type == "cpu" else 0,
        weights=sum(p.numel() * p.element_size() for p in ready.parameters()) + sum(m.bytes for m in integers),
        gradients=trainable * item,
        optimizer=state_numbers(ready, settings, trainable) * item,
        activations=activations,
        head=_head_bytes(ready, tokens, vocabulary, device),
        spare=int(SPARE * activations) + 2 * unpacked,
        trainable=trainable,
        parameters=sum(p.numel() for p in skeleton.model.parameters()),
        step_seconds=seconds,
        steps=steps,
        seconds=seconds * steps,
    )


def choose(
    settings: TuneSettings, memory: int, *, longest: int, mean: float, steps: int
) -> tuple[TuneSettings, TuneEstimate]:
    """Find the settings that fit in a memory: of those that give the same training the fastest, and only then another method.

    First the micro-batch is halved, then activations are computed anew in the backward pass, and last an adapter is trained in
    the place of what was asked for.

    Raises:
        TwofoldError: if nothing fits, with what the smallest takes.
    """
    speed = product_speed(choose_device(settings.device))
    methods = [settings.method, *(["lora"] if settings.method in ("full", "factors") else [])]
    micro_batches = [settings.micro_batch >> halvings for halvings in range(settings.micro_batch.bit_length())]
    tried: list[TuneEstimate] = []
    for method, again, micro in product(methods, (settings.gradient_checkpointing, True), micro_batches):
        if settings.batch % micro:
            continue
        changes: dict[str, Any] = {"gradient_checkpointing": again, "micro_batch": micro}
        if method != settings.method:
            changes |= {"method": method, "optimizer": "adamw", "optimizer_rank": None}
        changed = settings.model_copy(update=changes)
        tried.append(estimate(changed, longest=longest, mean=mean, steps=steps, speed=speed))
        if tried[-1].memory <= memory:
            return changed, tried[-1]
    smallest = min(tried, key=lambda way: way.memory)
    raise TwofoldError(
        f"{memory / 1e9:.2f} GB are too little: the smallest way takes {smallest.memory / 1e9:.2f} GB ({smallest.method}, one "
        f"row at a time of {longest} tokens); give more with `memory`, or a smaller `length`"
    )


def _give_shapes(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace tensors on the meta device by ones without numbers on the processor, so that each kernel keeps what it would."""
    shaped: dict[Tensor, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=wanted, device="cpu")
        shaped[tensor] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            store.update({name: shaped[tensor] for name, tensor in store.items() if tensor is not None})


def _ready(model: Any, settings: TuneSettings, names: list[str]) -> Any:
    """Return the model with what is trained; methods that only start elsewhere keep the same tensors as plain LoRA."""
    if settings.method == "factors":
        free_factors(model, names)
    if settings.method in ("full", "factors"):
        return model
    method = settings.method if settings.method == "dora" else "lora"
    plain = settings.model_copy(update={"method": method, "rank": settings.size})
    return get_peft_model(model, adapter_config(plain, names, 1))


def _head_bytes(model: Any, tokens: int, vocabulary: int, device: torch.device) -> int:
    """Count the bytes of the logits, a few positions at a time (see ``tuning.head``) or in TRL's tiles, with their gradients."""
    head = plain_head(model, device)
    if head is None:
        return TILES * tokens * min(vocabulary, VOCABULARY_TILE) * 4
    if not any(parameter.requires_grad for parameter in head.parameters()):  # the gradient takes the logits' place
        return min(tokens, ROWS) * vocabulary * 4
    # The logits, their exponentials and their gradient; the weight's gradient of one part, beside the sum of those before.
    return 3 * min(tokens, POSITIONS) * vocabulary * 4 + 2 * head.weight.numel() * head.weight.element_size()


def _trainable(settings: TuneSettings, model: Any) -> int:
    if settings.method == "vera":  # two vectors a layer
        layers = (module for module in model.modules() if hasattr(module, "lora_A"))
        return sum(module.out_features + settings.size for module in layers)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def kept_for_backward(model: Any, rows: int, length: int) -> int:
    """Count the bytes that the layers of a model keep for the backward pass of a batch, without weights; needs no numbers."""
    weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # by storage; kept alive, so that no storage's address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        causal.base_model(input_ids=torch.zeros(rows, length, dtype=torch.int64), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in weights)


def _linear(model: nn.Module) -> int:
    """Count the numbers of the linear layers: each is multiplied with once for each token."""
    return sum(
        module.numbers if isinstance(module, CompactLinear) else module.weight.numel()
        for module in model.modules()
        if isinstance(module, CompactLinear | nn.Linear)
    )


def product_speed(device: torch.device) -> float:
    """Measure the multiplications and additions in a second of a product of two matrices on this machine."""
    first, second = torch.randn(512, 768, device=device), torch.randn(768, 768, device=device)
    first @ second
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < PROBE_SECONDS:
        first @ second
        count += 1
    return count * 2.0 * 512 * 768 * 768 / (time.perf_counter() - begun)
