"""A Transformer trained from scratch on a text: dense, factorized, and dense with as few parameters as the factorized one.

    python benchmarks/scratch.py --text stories.txt --out scratch-bench/ --minutes 3
    python benchmarks/scratch.py --text stories.txt --out scratch-rules/ --rules --steps 200 --small --rates 1e-3 3e-3 1e-2 3e-2

Each arm has the same time to train (evaluations not counted), with a cosine rate that ends with the time. Its rate is its own
best of ``--rates``, chosen in short runs by the first half of the held-out text; what is reported is the loss on the second half.
With --steps the arms have the same floating-point operations in the place of the same time, and the result does not depend on
the speed of the machine. --rules compares the ways to scale the factors' steps at every rate. A run that is stopped begins again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tokenizers import ByteLevelBPETokenizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import twofold
from twofold.host.clock import machine
from twofold.host.files import write_text
from twofold.nn.layers.factored import FactoredLinear
from twofold.report.printed import COLOURS, on_paper, save_printed

BAR = 1.0  # factorized over dense, held-out loss at equal time
WARMUP = 0.1
POINTS = 8  # of a curve
NAMES = {"dense": "dense", "factorized": "factorized", "narrow": "dense, as many parameters as factorized"}


class Corpus:
    """A text as windows of tokens: to train on, to choose by, and to report."""

    def __init__(self, text: str, vocabulary: int, context: int) -> None:
        end, middle = int(0.95 * len(text)), int(0.975 * len(text))
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator([text[:end]], vocab_size=vocabulary, show_progress=False)
        self.vocabulary = tokenizer.get_vocab_size()

        def windows(part: str) -> torch.Tensor:  # (windows, context)
            ids = torch.tensor(tokenizer.encode(part).ids)
            if len(ids) < context:
                raise SystemExit("the text is too short: its held-out part does not fill a window")
            return ids[: len(ids) // context * context].view(-1, context)

        self.train, self.choose, self.report = windows(text[:end]), windows(text[end:middle]), windows(text[middle:])


RULES: dict[str, dict[str, Any]] = {
    "dense": {"scale": "none"},
    "none": {"scale": "none", "decay": "factors"},
    "product": {"scale": "product", "decay": "product"},
    "product-decay-factors": {"scale": "product", "decay": "factors"},
    "bound": {"scale": "bound", "decay": "factors"},
    "bound-decay-product": {"scale": "bound", "decay": "product"},
    "dense-bound": {"scale": "bound"},
}


@dataclass
class Budget:
    """How long a run trains: seconds, or steps."""

    seconds: float | None = None
    steps: int | None = None

    def share(self, part: float) -> Budget:
        return Budget(
            None if self.seconds is None else self.seconds * part,
            None if self.steps is None else max(round(self.steps * part), 1),
        )


@dataclass
class Run:
    """One training."""

    arm: str
    rate: float
    parameters: int
    steps: int = 0
    seconds: float = 0.0
    choose_loss: float = math.nan
    loss: float = math.nan
    curve: list[dict[str, float]] = field(default_factory=list)


class Clock(TrainerCallback):
    """Ends a run with its budget, and measures on the way; the time of measuring does not count."""

    def __init__(self, budget: Budget, corpus: Corpus, run: Run) -> None:
        self.budget, self.corpus, self.run = budget, corpus, run
        self.begun, self.paused = 0.0, 0.0

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        if self.budget.steps is not None:
            return min(self.run.steps / self.budget.steps, 1.0)
        return min(self.seconds / (self.budget.seconds or 1.0), 1.0)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun - self.paused if self.begun else 0.0

    def factor(self, _: int) -> float:
        """Of the rate: a rise over the first steps, then a cosine."""
        if self.progress < WARMUP:
            return max(self.progress / WARMUP, 0.02)
        return 0.5 * (1 + math.cos(math.pi * (self.progress - WARMUP) / (1 - WARMUP)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.run.steps, self.run.seconds = state.global_step, self.seconds
        done = self.progress >= 1
        if done or self.progress >= (len(self.run.curve) + 1) / POINTS:
            stopped = time.perf_counter()
            loss = held_out(model, self.corpus.report)
            self.run.curve.append({"step": self.run.steps, "seconds": self.run.seconds, "loss": loss})
            self.paused += time.perf_counter() - stopped
        control.should_training_stop = done


@torch.no_grad()
def held_out(
    model: Any,
    windows: torch.Tensor,  # (windows, context)
) -> float:
    """Nats a token."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def train(
    arm: str, model: Any, corpus: Corpus, budget: Budget, rate: float, options: argparse.Namespace, **rule: Any
) -> Run:
    """Train with transformers' Trainer; gives what was measured."""
    run = Run(arm, rate, sum(p.numel() for p in model.parameters()))
    clock = Clock(budget, corpus, run)
    optimizer = twofold.training_optimizer(
        model,
        lr=rate,
        embedding_lr=options.embedding_rate,
        weight_decay=options.weight_decay,
        **({"scale": options.scale} | rule),
    )
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"), per_device_train_batch_size=options.batch, max_steps=budget.steps or 10**7,
        seed=options.seed, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, use_cpu=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": one, "labels": one} for one in corpus.train],
        optimizers=(optimizer, LambdaLR(optimizer, clock.factor)),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    run.choose_loss = held_out(model, corpus.choose)
    run.loss = run.curve[-1]["loss"]
    print(f"{arm:>11}  rate {rate:<6g} {run.steps:5d} steps {run.seconds:6.1f} s  loss {run.loss:.4f}", file=sys.stderr)
    return run


def shapes(vocabulary: int, options: argparse.Namespace) -> tuple[LlamaConfig, LlamaConfig, int]:
    """The dense model, the narrower one, and the parameters of the factorized one, which the narrower one has too."""

    def config(hidden: int, inner: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=options.layers,
            num_attention_heads=options.heads, num_key_value_heads=options.heads, max_position_embeddings=options.context,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip

    dense = config(options.hidden, options.inner)
    wanted = sum(p.numel() for p in twofold.factorize(dense, keep=options.keep, seed=options.seed).parameters())

    def inner_for(hidden: int) -> int:
        rest = wanted - vocabulary * hidden - options.layers * (4 * hidden**2 + 2 * hidden) - hidden
        return round(rest / (3 * options.layers * hidden))

    ratio = options.inner / options.hidden
    widths = range(2 * options.heads, options.hidden, 2 * options.heads)
    hidden = min(widths, key=lambda h: abs(math.log(max(inner_for(h) / h, 1e-9) / ratio)))
    return dense, config(hidden, inner_for(hidden)), wanted


def build(arm: str, dense: LlamaConfig, narrow: LlamaConfig, options: argparse.Namespace) -> Any:
    """The model of an arm, from the seed."""
    if arm == "factorized":
        return twofold.factorize(dense, init=options.init, keep=options.keep, seed=options.seed)
    torch.manual_seed(options.seed)
    return LlamaForCausalLM(dense if arm == "dense" else narrow)


def operations(model: Any, context: int) -> int:
    """Floating-point operations of one token of training: six for each number that it is multiplied by, and attention."""
    config = model.config
    linear = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1)  # the tied embedding as output layer
    return 6 * (linear + config.num_hidden_layers * config.hidden_size * context)


def compare(corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """The three arms, each at its own best rate."""
    dense, narrow, wanted = shapes(corpus.vocabulary, options)
    whole = operations(build("dense", dense, narrow, options), options.context)
    probes, runs = [], {}
    for arm in NAMES:
        cost = operations(build(arm, dense, narrow, options), options.context)
        steps = None if options.steps is None else round(options.steps * whole / cost)
        budget = Budget(options.minutes * 60 if steps is None else None, steps)
        tried = [
            train(arm, build(arm, dense, narrow, options), corpus, budget.share(options.probe), rate, options)
            for rate in options.rates
        ]
        probes += tried
        best = min(tried, key=lambda run: run.choose_loss if math.isfinite(run.choose_loss) else math.inf)
        runs[arm] = train(arm, build(arm, dense, narrow, options), corpus, budget, best.rate, options)
    equal = "operations" if options.steps is not None else "time"
    last = min(runs["factorized"].steps, runs["narrow"].steps)
    figures = [
        {"what": f"factorized over dense, held-out loss at equal {equal}", "bar": BAR,
         "measured": runs["factorized"].loss / runs["dense"].loss},
        {"what": f"factorized over dense of as many parameters, held-out loss at equal {equal}", "bar": None,
         "measured": runs["factorized"].loss / runs["narrow"].loss},
        {"what": f"the same at equal steps ({last}; read from the curves)", "bar": None,
         "measured": at_step(runs["factorized"], last) / at_step(runs["narrow"], last)},
        {"what": "steps a second, factorized over dense", "bar": None,
         "measured": runs["factorized"].steps / runs["factorized"].seconds / (runs["dense"].steps / runs["dense"].seconds)},
    ]  # fmt: skip
    return {
        "figures": figures,
        "runs": [asdict(run) for run in runs.values()],
        "probes": [{k: v for k, v in asdict(run).items() if k != "curve"} for run in probes],
        "narrow": {"hidden": narrow.hidden_size, "inner": narrow.intermediate_size, "parameters_wanted": wanted},
    }


def at_step(run: Run, step: int) -> float:
    """The held-out loss at a step, on the straight line between the points of the curve."""
    before = max((p for p in run.curve if p["step"] <= step), key=lambda p: p["step"], default=run.curve[0])
    after = min((p for p in run.curve if p["step"] >= step), key=lambda p: p["step"], default=run.curve[-1])
    if after["step"] == before["step"]:
        return after["loss"]
    part = (step - before["step"]) / (after["step"] - before["step"])
    return before["loss"] + part * (after["loss"] - before["loss"])


def rules(corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """The held-out loss of each way to scale the factors' steps and to decay them, at each rate."""
    dense, narrow, _ = shapes(corpus.vocabulary, options)
    rows = []
    for name in options.rules or RULES:
        rule = RULES[name]
        for rate in options.rates:
            model = build("dense" if name.startswith("dense") else "factorized", dense, narrow, options)
            run = train(name, model, corpus, Budget(steps=options.steps), rate, options, **rule)
            norms = [
                float(torch.linalg.matrix_norm(m.to_dense(), 2))
                for m in model.modules()
                if isinstance(m, FactoredLinear)
            ]
            rows.append(
                {"rule": name, "rate": rate, "loss": run.loss, "highest_norm": max(norms, default=None), "curve": run.curve}
            )  # fmt: skip
    return {"rows": rows}


def draw(result: dict[str, Any], out: Path) -> None:
    """Held-out loss against time, and against steps."""
    with on_paper("scratch"):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        panels: Any = figure.subplots(1, 2, sharey=True)
        for axes, key, words in zip(panels, ("seconds", "step"), ("seconds of training", "steps"), strict=True):
            for i, run in enumerate(result["runs"]):
                points = run["curve"]
                label = f"{NAMES[run['arm']]} ({run['parameters'] / 1e6:.1f} M)"
                axes.plot([p[key] for p in points], [p["loss"] for p in points], color=COLOURS[i], marker="o", markersize=3.5,
                          linewidth=1.6, label=label)  # fmt: skip
            axes.grid(True)
            axes.set_xlabel(words)
        panels[0].set_ylabel("held-out loss (nats a token)")
        panels[0].legend(frameon=False, fontsize=9)
        save_printed(figure, [out / "curves.svg", out / "curves.png"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0, help="of the long run of each arm")
    parser.add_argument("--steps", type=int, help="of the dense arm; the others get as many operations")
    parser.add_argument("--probe", type=float, default=0.25, help="the share of it that each rate is tried for")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--embedding-rate", type=float, default=3e-3, help="of the embedding, in every arm")
    parser.add_argument("--rules", nargs="*", help="compare the ways to scale the steps, for --steps")
    parser.add_argument("--small", action="store_true", help="a model of a million parameters")
    for name, value in (
        ("keep", 0.5), ("weight-decay", 0.1), ("seed", 0), ("batch", 8), ("context", 128), ("vocabulary", 2048), ("layers", 6),
        ("heads", 8), ("hidden", 384), ("inner", 1024),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument(
        "--scale", default="bound", choices=("bound", "product", "none"), help="of the optimizer, the same in every arm"
    )
    parser.add_argument("--init", default="spectral", choices=("spectral", "random"))
    options = parser.parse_args()
    if options.small:
        options.hidden, options.inner, options.layers, options.vocabulary, options.context = 128, 352, 3, 512, 64
    unknown = [name for name in options.rules or () if name not in RULES]
    if unknown:
        parser.error(f"there is no rule {unknown[0]}; the rules are {', '.join(RULES)}")
    if options.rules is not None and options.steps is None:
        parser.error("--rules needs --steps")
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(options.text.read_text(encoding="utf-8"), options.vocabulary, options.context)
    result = rules(corpus, options) if options.rules is not None else compare(corpus, options)
    result["options"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    result["machine"] = machine(torch.device("cpu"), torch.float32).model_dump()
    write_text(options.out / "scratch.json", json.dumps(result, indent=1) + "\n")
    if options.rules is not None:
        for row in result["rows"]:
            print(f"| {row['rule']} | {row['rate']:g} | {row['loss']:.4f} | {row['highest_norm'] or 0:.2f} |")
        return
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["arm", "rate", "parameters", "step", "seconds", "loss"])
    for run in result["runs"]:
        for p in run["curve"]:
            writer.writerow([run["arm"], run["rate"], run["parameters"], p["step"], round(p["seconds"], 3), p["loss"]])
    write_text(options.out / "curves.csv", table.getvalue())
    draw(result, options.out)
    for one in result["figures"]:
        bar = "no bar" if one["bar"] is None else f"at most {one['bar']:g}: " + (
            "met" if one["measured"] <= one["bar"] else "NOT met"
        )  # fmt: skip
        print(f"| {one['what']} | {one['measured']:.4f} | {bar} |")


if __name__ == "__main__":
    main()
