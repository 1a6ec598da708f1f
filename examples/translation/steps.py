"""The time of a training step of two models, measured in turn on the same batches: the median, and that of the ratios.

    python steps.py pairs/ dense/ scratch/ --threads 1

The clock is that of the process, which counts the time of its own threads only: other programs disturb it less. ``--wall`` takes
the time that passes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from train import loss_of, make_batches, read_pairs
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import twofold


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("dense")
    parser.add_argument("factorized")
    parser.add_argument("--pairs", type=int, default=11, help="of steps")
    parser.add_argument("--batch-tokens", type=int, default=1000)
    parser.add_argument("--scale", default="none")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--wall", action="store_true")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.wall else time.process_time
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    sides = zip(*read_pairs(args.data / "train.jsonl")[:5000], strict=True)
    tokens = [tokenizer(list(side))["input_ids"] for side in sides]
    batches = make_batches(list(zip(*tokens, strict=True)), args.batch_tokens, random.Random(0))
    models = [AutoModelForSeq2SeqLM.from_pretrained(folder).train() for folder in (args.dense, args.factorized)]
    # At a rate of almost nothing, so that the models stay as they are.
    optimizers = [twofold.training_optimizer(model, lr=1e-12, scale=args.scale) for model in models]

    def step(which: int, batch: Any) -> float:
        start = clock()
        loss_of(models[which], batch, 0.1)[0].backward()
        torch.nn.utils.clip_grad_norm_(models[which].parameters(), 1.0)
        optimizers[which].step()
        optimizers[which].zero_grad()
        return clock() - start

    times: list[tuple[float, float]] = []
    for i in range(args.pairs + 1):
        batch = batches[i % len(batches)]
        if i % 2:
            times.append((step(0, batch), step(1, batch)))
        else:
            times.append((step(1, batch), step(0, batch))[::-1])
    dense, factorized = (statistics.median(side) for side in zip(*times[1:], strict=True))  # the first pair warms up
    ratio = statistics.median(b / a for a, b in times[1:])
    result = {"clock": "wall" if args.wall else "process", "pairs": args.pairs, "batch_tokens": args.batch_tokens}
    result |= {
        "dense_s": round(dense, 4),
        "factorized_s": round(factorized, 4),
        "factorized_over_dense": round(ratio, 4),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
