"""What a run will take: memory and disk from the shapes, time from a short probe of this machine.

The memory of a stage is a sum of what it holds at once, so it says too how many blocks of a model fit.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from twofold.allocate.base import get_allocation
from twofold.allocate.sensitivity import GRID
from twofold.calibrate.request import request_statistics
from twofold.decompose.decompose import BATCH, BATCH_NUMBERS
from twofold.errors import TwofoldError
from twofold.host import processes
from twofold.model.blocks import Chain
from twofold.model.load import LoadedModel, load_skeleton
from twofold.model.source import choose_device, compute_dtype
from twofold.model.streamed import LARGE, PART
from twofold.model.survey import survey
from twofold.model.weights import Target, list_weights
from twofold.objectives.base import get_objective
from twofold.planning.plan import Estimate
from twofold.run.estimate.probe import Speeds, probe
from twofold.settings.recipe import Recipe
from twofold.settings.sizes import parse_budget
from twofold.task.windows import held_out_windows

PART_OF_FREE = 0.85  # of the memory that is free, what is used unless --memory says otherwise
LIBRARIES = 420_000_000  # bytes of a process that has loaded torch and transformers and nothing else
READ = 5e8  # bytes a second from a disk that is not known
HASHED = 8e8  # bytes a second, read and hashed
WRITTEN = 3e8  # bytes a second
MOVED = 8e9  # bytes a second of weights that are read from memory to write one token
SAMPLE_STEPS = 128  # tokens of the sample answers of both models
SAMPLING = 3.5  # time of a sampled token over that of one that is read
TRAINED = (
    24  # bytes of a trained number beside itself: gradient, two moments, the best, what stood before, one more at work
)
STEP = 12  # time of a natural gradient's step and of the search for its size, over that of a decomposition
GRADIENTS = 1.25  # time of a pass that gives weights gradients too, over that of a calibration pass
SAVED = 1.4  # bytes of a forward pass that are kept for the backward pass, over those of the linear layers' inputs and outputs


@dataclass(frozen=True)
class Way:
    """How a model can be worked on, in bytes of peak memory."""

    resident: float  # all in memory
    streamed: float  # some blocks at a time
    limit: float
    blocks: int | None  # how many at a time; None: all in memory
    chain: Chain


@dataclass(frozen=True)
class Figures:
    """The sizes that memory and time depend on; numbers, not bytes, where nothing else is said."""

    numbers: int  # of the whole model
    block: int  # of the largest block
    blocks: int
    table: int  # the larger of the input embedding and the output head
    outside: int  # what stands in no block and is no table
    vocabulary: int
    targets: list[Target]
    block_targets: list[Target]  # those of the block with the most
    request: dict[str, int]  # kind of moment → numbers of the whole model
    block_request: dict[str, int]  # the same of one block
    element: int  # bytes of a number in computation
    stored: int  # bytes of a number on disk
    backward: bool


def memory_limit(recipe: Recipe) -> float:
    """How many bytes may be used.

    Raises:
        TwofoldError: if --memory is no number of bytes.
    """
    if recipe.memory is not None:
        amount, unit = parse_budget(recipe.memory)
        if unit != "bytes":
            raise TwofoldError(f"--memory {recipe.memory} is not understood: give bytes, as in --memory 6GB")
        return amount
    if recipe.device.startswith("cuda") or (recipe.device == "auto" and torch.cuda.is_available()):
        return torch.cuda.mem_get_info()[0] * PART_OF_FREE
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine's memory
    return float(min(psutil.virtual_memory().available, _contained()) * PART_OF_FREE / max(here, 1))


def _contained() -> float:
    """What a container or a limit of this process (ulimit) leaves of the memory, infinite if there is none."""
    left = float("inf")
    used = psutil.Process().memory_info()
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    with suppress(ImportError, OSError, ValueError):
        import resource

        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
            soft, _ = resource.getrlimit(kind)
            if soft != resource.RLIM_INFINITY:
                # The address space of the libraries counts against the limit, but takes little memory.
                left = min(left, max(float(soft - used.vms + used.rss), 0.0))
    return left


def figures_of(loaded: LoadedModel, chain: Chain | None, groups: dict[str, str], recipe: Recipe) -> Figures:
    """The sizes of a model without weights."""
    model = loaded.model
    found = list_weights(model, recipe.include, recipe.exclude)
    objective = get_objective(recipe.objective)
    request = request_statistics(found.targets, groups, objective.needs)
    sizes: dict[str, int] = {}
    inside: dict[str, int] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            sizes[name] = parameter.numel()
    blocks = chain.blocks if chain is not None else ()
    for name, size in sizes.items():
        index = chain.block_of(name) if chain is not None else None
        key = blocks[index] if index is not None else ""
        inside[key] = inside.get(key, 0) + size
    embedding = head = None
    with suppress(NotImplementedError, AttributeError):  # a model of several inputs
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [p.numel() for m in (embedding, head) if m is not None for p in m.parameters()]
    largest = max(blocks, key=lambda block: inside.get(block, 0), default="")
    of_block = [t for t in found.targets if chain is not None and t.name.startswith(f"{largest}.")] or found.targets
    names = {t.name for t in of_block}
    stored = loaded.stored_dtype
    compute = compute_dtype(recipe.dtype, stored, choose_device(recipe.device))
    table = max(tables, default=0)
    head_weight = getattr(head, "weight", None)
    return Figures(
        numbers=sum(sizes.values()),
        block=inside.get(largest, 0),
        blocks=len(blocks),
        table=table,
        outside=max(inside.get("", 0) - sum(dict.fromkeys(tables)), 0),
        vocabulary=int(head_weight.shape[0]) if head_weight is not None else 0,
        targets=found.targets,
        block_targets=of_block,
        request={kind: request.numbers_of(kind) for kind in request.sizes},
        block_request={kind: request.numbers_of(kind, names) for kind in request.sizes},
        element=compute.itemsize,
        stored=stored.itemsize,
        backward=request.backward,
    )


def memory_of(f: Figures, recipe: Recipe, blocks: int | None) -> dict[str, float]:
    """The peak memory of each stage, in bytes, with some blocks in memory at once, or all (None)."""
    batch = recipe.batch_size * recipe.window
    window = min(1024, recipe.window)
    through = sum(t.in_features + t.out_features for t in f.block_targets)  # numbers a token of one block
    at_once = f.blocks or 1 if blocks is None else min(blocks, f.blocks or 1)
    inputs = sum(n for kind, n in f.block_request.items() if kind in ("input", "output", "input_abs", "input_square"))
    gradients = sum(f.block_request.values()) - inputs
    wide_table = f.table * f.element > LARGE and f.stored < f.element
    table = f.table * (f.stored if wide_table else f.element) if blocks is not None else 0
    part = PART * (f.table // max(f.vocabulary, 1)) * f.element if wide_table and blocks is not None else 0
    stages: dict[str, float] = {}
    weights = f.numbers * f.element if blocks is None else (f.block * at_once + f.outside) * f.element
    states = 0.0
    if blocks is not None and recipe.activations == "memory" and get_objective(recipe.objective).needs:
        kept = -(-f.blocks // at_once) if f.backward else 2
        states = kept * recipe.all_tokens * (f.table // max(f.vocabulary, 1)) * f.element
    mapped = 0 if blocks is None else f.block * at_once * f.stored
    acting = batch * through * f.element * (SAVED * at_once if f.backward else 0.7)
    logits = batch * f.vocabulary * 4
    # The last stretch collects both at once.
    moments = (sum(f.request.values()) if blocks is None else (inputs + gradients) * at_once) * 4
    stages["load"] = LIBRARIES + weights + (f.numbers * f.stored if blocks is None else mapped)
    if get_objective(recipe.objective).needs:
        head = table + part + 3 * logits if f.backward else table
        stages["calibrate"] = (
            LIBRARIES
            + weights
            + states
            + moments
            + max(acting + (head if blocks is None or f.backward else 0), mapped, table)
        )
    side = max((min(t.out_features, t.in_features) for t in f.targets), default=0)
    size = max((t.size for t in f.targets), default=0)
    if "shared-basis" in get_objective(recipe.objective).structures:
        size *= recipe.share_blocks
    together = max(1, min(BATCH, BATCH_NUMBERS // max(side, 1) ** 2))
    unit = (
        sum(min(t.out_features, t.in_features) ** 2 for t in f.block_targets) * 4 * (4 if blocks is None else at_once)
    )
    work = together * (side * side * 8 * 9 + size * 8)
    stages["decompose"] = LIBRARIES + weights + unit * 2 + work
    factors = f.numbers * f.element if blocks is None else f.block * at_once * f.stored + table
    stages["factorize"] = LIBRARIES + weights + factors + side * side * 8 * 6 + size * 8 * 3
    if recipe.refine and blocks is None:
        trained = (recipe.keep or 1.0) * sum(t.size for t in f.targets)
        window_acting = recipe.window * through * f.element * SAVED * at_once
        held = 0.0
        if any(name != "natural-gradient" for name in recipe.refine):
            held = trained * TRAINED
        if "natural-gradient" in recipe.refine:  # two halves of its gradient, and the factors before
            held = max(held, 8 * _gradient_numbers(f) + 4 * trained)
        stages["refine"] = (
            LIBRARIES + weights + trained * f.element + held + window_acting + 3 * recipe.window * f.vocabulary * 4
        )
    if recipe.eval_windows:
        stages["measure"] = (
            LIBRARIES + weights + (factors if blocks is None else table + part) + window * f.vocabulary * 4 * 4
        )
    return stages


def choose_way(recipe: Recipe) -> Way | None:
    """Choose how to work on a model: in memory if it fits, else by as many blocks at a time as fit.

    Returns:
        None for a model whose size can't be told before it is loaded (a GGUF file).

    Raises:
        TwofoldError: if not even one block fits, or the model can't be worked through by blocks.
    """
    limit = processes.least(memory_limit(recipe))  # all processes must choose the same
    if recipe.model.endswith(".gguf") or recipe.stream == "never":
        return None
    loaded = load_skeleton(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    return way_of(loaded, recipe, limit)


def way_of(loaded: LoadedModel, recipe: Recipe, limit: float) -> Way:
    """The same for a model without weights that is at hand."""
    rough = figures_of(loaded, None, {}, recipe)
    whole = memory_of(rough, recipe, None)
    nothing = Chain((), False)
    sure = recipe.stream == "never" or (recipe.stream == "auto" and max(whole.values()) * 1.5 < limit)
    if sure:  # no need to look closer
        return Way(max(whole.values()), 0.0, limit, None, nothing)
    foreign = getattr(loaded.model.config, "quantization_config", None) is not None
    found = None
    reason = "it is quantized or factorized already" if foreign else "its blocks do not simply follow one another"
    if not foreign:
        try:
            found = survey(loaded, list_weights(loaded.model, recipe.include, recipe.exclude).targets)
        except TwofoldError as error:
            reason = str(error)
    chain = found.chain if found is not None else None
    f = figures_of(loaded, chain, found.groups if found is not None else {}, recipe)
    whole = memory_of(f, recipe, None)
    resident = max(whole.values())
    if resident <= limit and recipe.stream == "auto":
        return Way(resident, 0.0, limit, None, chain or nothing)
    if chain is None:
        raise TwofoldError(
            f"{recipe.model} takes about {resident / 1e9:.1f} GB and {limit / 1e9:.1f} GB may be used, and it can't be worked "
            f"through block by block: {reason}; give it more memory with --memory"
        )
    fitting = [n for n in range(1, len(chain) + 1) if max(memory_of(f, recipe, n).values()) <= limit]
    if not fitting:
        least = memory_of(f, recipe, 1)
        stage = max(least, key=lambda name: least[name])
        raise TwofoldError(
            f"{recipe.model} can't be worked on with {limit / 1e9:.1f} GB: one block at a time takes about "
            f"{least[stage] / 1e9:.1f} GB (to {stage}); give it more with --memory, or try --window {max(recipe.window // 2, 2)}"
        )
    blocks = 1 if recipe.stream == "always" and recipe.memory is None else fitting[-1]
    return Way(resident, max(memory_of(f, recipe, blocks).values()), limit, blocks, chain)


def estimate_run(loaded: LoadedModel, recipe: Recipe, output_bytes: int) -> Estimate:
    """What a run of a recipe will take: memory and disk from the shapes, time from a probe of some seconds.

    Args:
        loaded: the model without weights.
        output_bytes: of the factored checkpoint.

    Raises:
        TwofoldError: if it can't be done in the memory that may be used.
    """
    limit = memory_limit(recipe)
    way = way_of(loaded, recipe, limit)
    found = list_weights(loaded.model, recipe.include, recipe.exclude)
    groups: dict[str, str] = {}
    chain: Chain | None = way.chain if len(way.chain) else None
    try:
        surveyed = survey(loaded, found.targets)
        groups, chain = surveyed.groups, surveyed.chain
    except TwofoldError:  # a model that does not run on token ids alone is estimated as one piece
        pass
    f = figures_of(loaded, chain, groups, recipe)
    memory = memory_of(f, recipe, way.blocks)
    speeds = probe(loaded, chain, f.block_targets, groups, recipe, f.table)
    seconds = seconds_of(f, speeds, recipe, way.blocks, read_speed(loaded))
    states = 0
    if way.blocks is not None and recipe.activations == "disk":
        stretch_count = -(-f.blocks // way.blocks)
        kept = stretch_count if f.backward else 2
        states = kept * recipe.all_tokens * (f.table // max(f.vocabulary, 1)) * f.element
    bases = 4 * sum(min(t.out_features, t.in_features) ** 2 for t in f.targets)
    if "natural-gradient" in recipe.refine and way.blocks is None:
        states += 8 * _gradient_numbers(f)
    return Estimate(
        blocks_at_once=way.blocks,
        peak_memory=int(max(memory.values())),
        memory_limit=int(limit),
        memory={name: int(value) for name, value in memory.items()},
        seconds={name: round(value, 1) for name, value in seconds.items()},
        total_seconds=round(sum(seconds.values()), 1),
        moments_bytes=4 * sum(f.request.values()),
        work_bytes=bases + states + (output_bytes if way.blocks is not None else 0),
        output_bytes=output_bytes,
        threads=torch.get_num_threads(),
    )


def seconds_of(f: Figures, s: Speeds, recipe: Recipe, blocks: int | None, bytes_a_second: float) -> dict[str, float]:
    """The time of each stage."""
    count = max(f.blocks, 1)
    batches = -(-recipe.all_tokens // s.batch)
    stored = f.numbers * f.stored
    sweeps = 1.0
    again = 0 if blocks is None else count - min(blocks, count)  # blocks that are computed once more
    if f.backward:
        calibrate = batches * (count * s.both + again * s.forward + s.head)
        sweeps += again / count
    else:
        calibrate = batches * count * s.forward
    windows = recipe.eval_windows
    window = s.forward * recipe.window / s.batch
    found = {
        "load": stored / bytes_a_second + 3,  # the libraries among it
        "hash": stored / HASHED,
        "calibrate": calibrate if get_objective(recipe.objective).needs else 0.0,
        "decompose": count * s.decompose,
        "factorize": count * s.factorize,
        "measure": 2 * windows * (count * window + s.head_forward),
        "write and report": 4 + stored / WRITTEN,
    }
    found |= _for_allocation(f, s, recipe, count * window + s.head_forward, batches * (count * s.both + s.head))
    if recipe.refine and blocks is None:
        found["refine"] = _refining(s, recipe, count, batches)
    written = recipe.continuations
    if recipe.calibration == ["self"]:
        written = recipe.tokens + held_out_windows(recipe) * recipe.window
    if written and get_objective(recipe.objective).needs:
        found["texts"] = written / s.batch * count * s.forward * SAMPLING
    if blocks is None:
        found["samples"] = SAMPLE_STEPS * f.numbers * f.element / MOVED
    else:
        reads = sweeps * (f.backward or bool(get_objective(recipe.objective).needs)) + 2 + 1.6 * bool(windows)
        found["read blocks"] = reads * stored / bytes_a_second
        found["load"] = 3.0
    return found


def _for_allocation(f: Figures, s: Speeds, recipe: Recipe, window: float, sweep: float) -> dict[str, float]:
    """The time of what an allocation measures on the model.

    Args:
        window: seconds to measure one calibration window.
        sweep: seconds of a pass forward and backward over the calibration text.
    """
    allocation, count = get_allocation(recipe.allocate), max(f.blocks, 1)
    if allocation.again:
        return {"recalibrate": sweep + count * (s.decompose + s.factorize)}
    if "perplexities" in allocation.needs:
        return {"sensitivities": len(f.targets) * len(GRID) * recipe.sensitivity_windows * window}
    return {"sensitivities": sweep} if allocation.needs else {}


def _refining(s: Speeds, recipe: Recipe, count: int, batches: int) -> float:
    """The time of all refinements of a recipe.

    Args:
        count: blocks of the model.
        batches: of the calibration.
    """
    learn = s.both * GRADIENTS
    each = {
        "anchored": count * (batches * 5 * s.forward + 2 * s.decompose),
        "blockwise": count * batches * (2 * s.forward + recipe.refine_passes * (s.forward + learn)),
        "distill": batches * ((count * s.forward + s.head_forward) + recipe.refine_passes * (count * learn + s.head)),
        "natural-gradient": batches * (count * s.forward + s.head_forward)
        + recipe.refine_rounds * (batches * (count * learn + s.head) + count * STEP * s.decompose),
    }
    total = sum(each.get(name, 0.0) for name in recipe.refine)
    return min(total, 60 * recipe.minutes) if recipe.minutes is not None else total


def _gradient_numbers(f: Figures) -> int:
    """The numbers of one half of a natural gradient: gradients, and moments of both sides as if none were shared."""
    return sum(t.size + t.out_features**2 + t.in_features**2 for t in f.targets)


def read_speed(loaded: LoadedModel) -> float:
    """Bytes a second that weights are read and cast with, from the first file of the model or else a guess."""
    path = next(iter(sorted(loaded.source.glob("*.safetensors"))), None) if loaded.source is not None else None
    if path is None:
        return READ
    start = time.perf_counter()
    with path.open("rb") as file:
        part = file.read(64_000_000)
    if len(part) < 1_000_000:
        return READ
    numbers = torch.frombuffer(bytearray(part[: len(part) // 2 * 2]), dtype=torch.bfloat16)
    torch.isfinite(numbers.to(torch.float32)).all()
    return len(part) / (time.perf_counter() - start)
