"""The bars of fine-tuning, each measured against its value; needs ``pip install '.[tune]'``.

    python benchmarks/tune.py --data rows.jsonl --out tune-bench/

The factorized model is calibrated and distilled on the rows that are trained on, and never on those that are held out. Every
training is a process of its own, so that its peak memory is its own. What is in the output folder is not made again, so that a
benchmark that was stopped goes on. --steps 3 on a tiny model shows that it runs; its figures say nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F

import twofold
from twofold.model.load import load_tokenizer
from twofold.nn.layers.factored import FactoredLinear
from twofold.tuning.prepare import prepare
from twofold.tuning.settings import make_settings
from twofold.tuning.tokens import Example, Examples


class Bench:
    """The runs in one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = [
            "--data", str(options.data), "--held-out", str(options.held_out), "--length", str(options.length), "--long", "cut",
            "--batch", str(options.batch), "--micro-batch", str(options.micro_batch), "--seed", "0",
        ]  # fmt: skip
        if options.gradient_checkpointing:
            self.rows.append("--gradient-checkpointing")
        self.bars: list[dict[str, Any]] = []

    def command(self, *given: str, threads: int | None = None) -> list[str]:
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-m", "twofold", *given]
        print("$ twofold", *given, file=sys.stderr, flush=True)
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return command

    def tune(self, name: str, model: str, method: str, *extra: str) -> dict[str, Any]:
        """One training; gives its record."""
        out = self.folder / name
        if not (out / "run.json").is_file():
            steps = str(self.options.steps)
            self.command(
                "tune", model, *self.rows, "--method", method, "--steps", steps, "--evaluate-every", steps, "--save-every", steps,
                *extra, "--out", str(out),
            )  # fmt: skip
        record: dict[str, Any] = json.loads((out / "run.json").read_text())
        return record

    def bar(self, what: str, measured: float, limit: float, *, least: bool = False) -> None:
        met = measured >= limit if least else measured <= limit
        self.bars.append(
            {"bar": what, "measured": measured, "limit": limit, "kind": "at least" if least else "at most", "met": met}
        )

    @functools.cached_property
    def examples(self) -> Examples:
        """The rows as they are tokenized and split in every training."""
        settings = {
            "model": self.options.model, "data": [str(self.options.data)], "held_out": float(self.options.held_out),
            "length": self.options.length, "long": "cut", "steps": 1,
        }  # fmt: skip
        return prepare(make_settings(settings)).examples

    def training_rows(self) -> Path:
        """The rows that are trained on, as texts to calibrate on."""
        path = self.folder / "rows.jsonl"
        tokenizer = load_tokenizer(self.options.model)
        texts = [tokenizer.decode(one.input_ids) for one in self.examples.train]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    def run(self) -> None:
        options = self.options
        factored = str(options.factored or self.folder / "factored")
        moments = self.folder / "moments"
        if options.factored is None and not (self.folder / "factored" / "run.json").is_file():
            refined = [
                "--refine", "distill", "--refine-steps", str(options.refine_steps), "--refine-labels", str(options.refine_labels),
            ] if options.refine_steps else []  # fmt: skip
            self.command(
                "compress", options.model, "--keep", str(options.keep), "--eval-windows", "0",
                "--calibration", str(options.calibration or self.training_rows()),
                "--tokens", str(options.tokens), "--seed", "0", "--moments", str(moments), *refined, "--out", factored,
            )  # fmt: skip
        full = self.tune("dense-full", options.model, "full")
        lora = self.tune("dense-lora", options.model, "lora")
        small = self.tune("factored-lora", factored, "lora")
        factors = self.tune("factored-factors", factored, "factors")

        self.bar("lora against full: peak memory", lora["peak_memory"] / full["peak_memory"], 0.55)
        self.bar("lora against full: step time", lora["step_seconds"] / full["step_seconds"], 0.75)
        self.bar("lora against full: held-out loss", lora["held_out_after"] / full["held_out_after"], 1.03)
        best = min((small, factors), key=lambda record: record["held_out_after"])
        self.bar(
            "factored, tuned, against dense lora: held-out loss", best["held_out_after"] / lora["held_out_after"], 1.03
        )
        self.bar("factored lora against dense lora: peak memory", small["peak_memory"] / lora["peak_memory"], 0.9)
        self.bar("factored lora against dense lora: step time", small["step_seconds"] / lora["step_seconds"], 0.9)
        for record in (full, lora, small, factors):
            name = f"{Path(record['settings']['model']).name} {record['settings']['method']}"
            off = abs(record["estimated_memory"] / record["peak_memory"] - 1)
            self.bar(f"estimate of the peak memory off by, {name}", off, 0.15)
        examples = self.examples.held_out
        self.merged(factored, moments if (moments / "moments.json").is_file() else None, examples)
        self.extracted(full, examples)
        self.killed()

    def merged(self, factored: str, moments: Path | None, examples: list[Example]) -> None:
        adapter = str(self.folder / "factored-lora")
        for name, extra in (("merged", []), ("recompressed", ["--recompress"])):
            if extra and moments is not None:
                extra += ["--moments", str(moments)]
            if not (self.folder / name / "run.json").is_file():
                self.command("merge", factored, adapter, *extra, "--out", str(self.folder / name))
        base = twofold.load_model(factored).model
        before = {name: m.rank for name, m in base.named_modules() if isinstance(m, FactoredLinear)}
        adapted = PeftModel.from_pretrained(base, adapter).eval()
        merged = twofold.load_model(str(self.folder / "merged")).model
        ids = torch.tensor([max((e.input_ids for e in examples), key=len)])
        with torch.no_grad():
            expected, found = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
        self.bar("exact merge: logits, relative", float((found - expected).norm() / expected.norm()), 1e-5)
        rank = json.loads((self.folder / "factored-lora" / "run.json").read_text())["settings"]["rank"] or 16
        after = {name: m.rank for name, m in merged.named_modules() if isinstance(m, FactoredLinear)}
        wrong = sum(rank_after != before[name] + rank for name, rank_after in after.items())
        self.bar("exact merge: factored layers whose rank did not grow by r", float(wrong), 0.0)
        print(
            f"{len(before) - len(after)} of {len(before)} factored layers reached full rank and became dense",
            file=sys.stderr,
        )
        loss = held_out_loss(adapted, examples)
        del adapted, base, merged
        smaller = twofold.load_model(str(self.folder / "recompressed")).model
        self.bar("merged and re-compressed: held-out loss", held_out_loss(smaller, examples) / loss, 1.02)

    def extracted(self, full: dict[str, Any], examples: list[Example]) -> None:
        out = self.folder / "extracted"
        if not (out / "run.json").is_file():
            self.command(
                "extract",
                str(self.folder / "dense-full"),
                "--base",
                self.options.model,
                "--rank",
                "16",
                "--out",
                str(out),
            )
        model = PeftModel.from_pretrained(twofold.load_model(self.options.model).model, str(out)).eval()
        gained = full["held_out_before"] - full["held_out_after"]
        kept = (full["held_out_before"] - held_out_loss(model, examples)) / gained
        self.bar("extracted adapter of rank 16: share of the improvement", kept, 0.9, least=True)

    def killed(self) -> None:
        """Kill a training twice, and compare its weights with those of one that was left alone; one thread."""
        settings = ["--steps", "6", "--batch", "2", "--held-out", "2", "--save-every", "2", "--evaluate-every", "6"]
        rows = ["--data", str(self.options.data), "--length", "128", "--long", "cut", "--quiet"]
        command = ["tune", self.options.model, *rows, *settings, "--out"]
        alone, killed = self.folder / "alone", self.folder / "killed"
        if not alone.exists():
            self.command(*command, str(alone), threads=1)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if not killed.exists():
            for step in (2, 4):
                seen = self.folder / "killed.partial" / "tune" / f"checkpoint-{step}"
                process = subprocess.Popen([sys.executable, "-m", "twofold", *command, str(killed)], env=environment)
                while not seen.exists() and process.poll() is None:
                    time.sleep(0.005)
                process.kill()
                process.wait()
            self.command(*command, str(killed), threads=1)
        files = [folder / "adapter_model.safetensors" for folder in (alone, killed)]
        same = files[0].read_bytes() == files[1].read_bytes()
        self.bar("killed twice and started again: weights that differ", 0.0 if same else 1.0, 0.0)


@torch.no_grad()
def held_out_loss(model: Any, examples: list[Example]) -> float:
    """Nats a token, by the logits."""
    total = count = 0.0
    for one in examples:
        logits = model(input_ids=torch.tensor([one.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(one.labels[1:])
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, required=True, help="rows to train on, .jsonl")
    parser.add_argument(
        "--calibration", type=Path, help="text to calibrate the factorization on, in the place of the rows"
    )
    parser.add_argument("--factored", type=Path, help="a factorized model, in the place of making one")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--refine-steps", type=int, default=50, help="of distillation; 0: none")
    parser.add_argument("--refine-labels", type=float, default=0.4, help="share of the rows' own tokens in its loss")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="longer rows are cut")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    bench = Bench(options)
    bench.run()
    for bar in bench.bars:
        print(
            f"{'met' if bar['met'] else 'MISSED':7} {bar['bar']}: {bar['measured']:.4g} ({bar['kind']} {bar['limit']:g})"
        )
    print("training from scratch has a benchmark of its own: benchmarks/scratch.py")
    (options.out / "bars.json").write_text(json.dumps(bench.bars, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(bar["met"] for bar in bench.bars) else 1)


if __name__ == "__main__":
    main()
