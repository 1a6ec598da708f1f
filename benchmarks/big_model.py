"""A Llama-shaped checkpoint of 3.2 billion random weights, to run what is made for models larger than the memory.

    python benchmarks/big_model.py --out DIR                  # Llama-3.2-3B's shape, bfloat16, 6.4 GB
    python benchmarks/big_model.py --out DIR --layers 8       # any other shape by its sizes
    python benchmarks/big_model.py --out DIR --preset tiny    # 230,000 weights, for a test

Only the shape is a real model's. The weights are drawn so that what a factorization meets is alike: the singular values
decay, and the activations stay of a healthy size through all blocks. The files are written as they are drawn, so memory
holds one weight at a time. The same seed gives the same weights on the same machine with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]  # the weights in the order of the checkpoint
DTYPE, STORED = torch.bfloat16, "BF16"
LLAMA_3B = {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv_heads": 8, "vocab": 128256}
PRESETS = {
    "3b": {**LLAMA_3B, "shard_bytes": 10**9},
    "tiny": {
        "layers": 4, "hidden": 64, "intermediate": 192, "heads": 4, "kv_heads": 2, "vocab": 512, "shard_bytes": 150_000
    },
}  # fmt: skip


def llama(sizes: argparse.Namespace) -> tuple[Any, Shapes]:
    """The configuration, and the shapes of the weights that its checkpoint stores (the head is the embedding's)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        dtype=DTYPE,
    )
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    return config, {name: tuple(tensor.shape) for name, tensor in state.items() if name != "lm_head.weight"}


def spectrum(k: int) -> Tensor:
    """d (k,), of norm 1: a heavy head that falls as a power, over a bulk that falls exponentially."""
    i = torch.arange(k, dtype=torch.float32)
    d = (1 + i) ** -0.5 + 0.3 * torch.exp(-3 * i / k)
    return d / d.norm()


def pieces(
    name: str, shape: tuple[int, ...], std: float, generator: torch.Generator, rows: int = 8192
) -> Iterator[Tensor]:
    """The rows of one weight, some at a time, in float32.

    A projection is A diag(d) B with gaussian A (m, k) and B (k, n), k = min(m, n): since d has norm 1, its entries have
    the standard deviation std. An embedding is gaussian and a norm's weight is close to 1.
    """

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    if len(shape) == 1:
        yield 1 + 0.05 * gaussian(*shape)
    elif "embed_tokens" in name:
        for start in range(0, shape[0], rows):
            yield gaussian(min(rows, shape[0] - start), shape[1]) * std
    else:
        m, n = shape
        k = min(m, n)
        right = gaussian(k, n).mul_(std * spectrum(k)[:, None])
        yield gaussian(m, k) @ right


def deviation(name: str, hidden: int, layers: int) -> float:
    """The standard deviation of a weight's entries: 0.02 at Llama-3.2-3B's width, and activations as large at any other.

    What writes to the residual stream is smaller by √(2 layers), the number of its terms (GPT-2's initialization).
    """
    std = 0.02 * math.sqrt(LLAMA_3B["hidden"] / hidden)
    return std / math.sqrt(2 * layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else std


def shards(shapes: Shapes, most: int) -> list[Shapes]:
    """The weights in files of at most so many bytes, filled in order as transformers does; a block may span two."""
    files: list[Shapes] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * DTYPE.itemsize
        if files[-1] and held + size > most:
            files.append({})
            held = 0
        files[-1][name] = shape
        held += size
    return files


def write_shard(path: Path, shapes: Shapes, hidden: int, layers: int, seed: int) -> None:
    """Draw weights straight into a safetensors file: the header needs only their shapes, so none waits for another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * DTYPE.itemsize
        header[name] = {"dtype": STORED, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            # Each weight has a seed of its own, so it does not depend on the shards or on the number of blocks.
            generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
            for piece in pieces(name, shape, deviation(name, hidden, layers), generator):
                file.write(piece.to(DTYPE).contiguous().view(torch.int16).numpy().data)


def save_tokenizer(folder: Path) -> None:
    """One token a byte, as in the tests: ids to 258, whatever the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    vocabulary |= {name: 256 + i for i, name in enumerate(["<bos>", "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def big_model(sizes: argparse.Namespace) -> tuple[int, int]:
    """Write the checkpoint into the empty folder sizes.out; its numbers and the bytes of its weights."""
    from transformers import GenerationConfig

    out: Path = sizes.out
    config, shapes = llama(sizes)
    files = shards(shapes, sizes.shard_bytes)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    total = numbers * DTYPE.itemsize
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    start, done = time.perf_counter(), 0
    for i, part in enumerate(files, 1):
        path = out / f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_shard(path, part, sizes.hidden, sizes.layers, sizes.seed)
        index |= dict.fromkeys(part, path.name)
        done += sum(math.prod(shape) for shape in part.values()) * DTYPE.itemsize
        print(f"{path.name}  {done / total:4.0%}  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    record = {"metadata": {"total_parameters": numbers, "total_size": total}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    save_tokenizer(out)
    GenerationConfig(bos_token_id=256, eos_token_id=257, pad_token_id=258).save_pretrained(out)
    config.save_pretrained(out)  # last: a folder without it is not a model, so half a checkpoint is not taken for one
    return numbers, total


def arguments() -> argparse.Namespace:
    """The settings of the command line; a preset gives those that are left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="3b", help="the sizes that are not given")
    for name in (*LLAMA_3B, "shard_bytes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name, size in PRESETS[given.preset].items():
        if getattr(given, name) is None:
            setattr(given, name, size)
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(given, name)}; give at least 1")
    if given.hidden % given.heads or given.heads % given.kv_heads or given.hidden // given.heads % 2:
        parser.error("--hidden must be an even multiple of --heads, and --heads a multiple of --kv-heads")
    if given.vocab < 259:
        parser.error(f"--vocab is {given.vocab}; the byte tokenizer needs 259")
    if not 0 <= given.seed < 2**31:
        parser.error(f"--seed is {given.seed}; give 0 to 2147483647")
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        parser.error(f"{given.out} is not an empty folder; name another, or remove it")
    return given


def main() -> None:
    sizes = arguments()
    start = time.perf_counter()
    numbers, total = big_model(sizes)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{sizes.out}: {numbers:,} numbers, {total / 1e9:.2f} GB, {time.perf_counter() - start:.0f} s, "
        f"peak memory {usage / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
