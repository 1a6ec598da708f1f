"""The bars of speech, sentences, images and translation, each measured by the commands that a user has: docs/families.md.

    python benchmarks/families.py whisper whisper-neighbours --data MODELS --out DIR
    python benchmarks/families.py all --data MODELS --out DIR --clips 20      # a quick look; its figures say little

MODELS holds what is measured, none of it ours:

    whisper-tiny.en/                transformers folder with its processor
    speech/{calibration,test}/      clips, and words.jsonl with rows of "file" and "text"
    minilm/                         all-MiniLM-L6-v2 as sentence-transformers saves it
    sentences.txt                   to calibrate on, one a line
    sts-test.csv                    STS benchmark, tab-separated, as published
    vit-digits/, digits/{train,test}/CLASS/*.png
    dinov2-small/, stamps/{train,test}/CLASS/*.png
    translation/{dense,scratch}/, translation/{train,dev,test}.jsonl        of examples/translation

Every figure is taken on samples that were not calibrated on. Folders that are in DIR already are not made again, so that a
benchmark that was stopped goes on. Each bar is printed as a row of a table, and all records are kept in DIR/families.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bars import Bar, table

if TYPE_CHECKING:
    from twofold.evaluation.on_data import DataEvaluation, MeasuredModel

ROOT = Path(__file__).resolve().parents[1]
SPEECH = {"include": ["model.encoder.*"], "samples": 100}
SENTENCES = {"samples": 2000, "batch_size": 32}
IMAGES = {"samples": 1000, "batch_size": 16}
PAIRS = {"text_column": "source", "target_column": "target"}
TRANSLATION = {**PAIRS, "samples": 1000, "batch_size": 16}
# What LiteASR's rule and SVD-LLM are in their papers; ours is the default of Twofold.
NEIGHBOURS: dict[str, dict[str, Any]] = {
    "LiteASR's rule": {"objective": "lite-asr"},
    "svd-llm, uniform, plain": {"objective": "svd-llm", "allocate": "uniform", "form": "plain"},
    "two-sided, global, gauge": {},
}


class Bench:
    """Where the models lie, what was made of them, and what they gave."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.data: Path = options.data.resolve()
        self.out: Path = options.out.resolve()
        self.options = options
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "families.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text("utf-8")) if self.file.is_file() else {}
        self.bars: list[Bar] = []
        os.environ["TWOFOLD_CACHE"] = str(self.out / "cache")  # the moments of one model serve all its runs here

    def keep(self, name: str, record: Any) -> None:
        """Put a record into the file of all."""
        self.results[name] = record
        self.file.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def bar(self, name: str, bar: str, figure: str, met: bool) -> None:
        """Print a figure beside its bar, and keep it."""
        self.bars.append(Bar(name, bar, figure, met))
        self.keep(f"bar: {name}", {"bar": bar, "figure": figure, "met": met})
        print(table(self.bars[-1:])[-1], flush=True)

    def compressed(self, name: str, model: str, calibration: str, keep: float, **settings: Any) -> Path:
        """The folder of a model that is factorized; its record is kept."""
        import twofold

        folder = self.out / name
        if not (folder / "run.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            start = time.perf_counter()
            given = {"calibration": [str(self.data / calibration)], "eval_windows": 0, "seed": 0, **settings}
            run = twofold.compress(str(self.data / model), folder, keep=keep, quiet=True, **given)
            assert run is not None
            self.keep(f"run: {name}", {
                "keep": keep, **settings, "kept": run.keep, "parameters": run.target_after, "stages": run.seconds,
                "seconds": round(time.perf_counter() - start, 1), "peak GiB": round(run.peak_memory / 2**30, 2),
                "predicted divergence": run.predicted_divergence, "notes": run.notes,
            })  # fmt: skip
        return folder

    def measured(self, folder: Path, against: str, data: str, **columns: Any) -> tuple[MeasuredModel, MeasuredModel]:
        """The original and a factored model on data; the record is kept."""
        import twofold

        result: DataEvaluation | Any = twofold.evaluate(
            str(folder), data=str(self.data / data), against=str(self.data / against), quiet=True, **columns
        )
        self.keep(f"eval: {folder.name} on {data}", result.model_dump())
        dense, small = result.models
        return dense, small

    def share(self, folder: Path) -> float:
        """What a folder's plan keeps of the weights that it is for."""
        return kept(folder)["after"] / kept(folder)["before"]


def kept(folder: Path) -> dict[str, int]:
    """The numbers of the targeted weights before and after, by a folder's plan."""
    entries = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["entries"]
    return {key: sum(entry[f"numbers_{key}"] for entry in entries) for key in ("before", "after")}


def of_whisper(bench: Bench, name: str, keep: float, **settings: Any) -> tuple[MeasuredModel, MeasuredModel, Path]:
    """Whisper with its encoder factorized, on the clips that it was not calibrated on."""
    folder = bench.compressed(name, "whisper-tiny.en", "speech/calibration", keep, **SPEECH, **settings)
    dense, small = bench.measured(folder, "whisper-tiny.en", "speech/test", samples=bench.options.clips)
    return dense, small, folder


def row(dense: MeasuredModel, small: MeasuredModel, measure: str) -> str:
    """A figure of two models: the measure over the original's."""
    ratio = small.scores[measure] / dense.scores[measure]
    return f"{small.scores[measure]:.4f}, {ratio:.4f} × dense ({dense.scores[measure]:.4f})"


def whisper(bench: Bench) -> None:
    """No training, keep 0.85 of the encoder's linear weights."""
    dense, small, folder = of_whisper(bench, "whisper-0.85", 0.85)
    about = f"Whisper tiny.en, {bench.share(folder):.4f} of the encoder's linear weights"
    assert small.divergence is not None
    bench.bar(
        f"{about}: divergence of the decoder on the dense transcript, nats a token", "≤ 0.007",
        f"{small.divergence:.5f}", small.divergence <= 0.007,
    )  # fmt: skip
    bench.bar(f"{about}: WER", "≤ 1.03 × dense", row(dense, small, "wer"),
              small.scores["wer"] <= 1.03 * dense.scores["wer"])  # fmt: skip


def whisper_neighbours(bench: Bench) -> None:
    """Rules as published beside ours, at equal parameters."""
    for keep in bench.options.keeps:
        divergences, shares = {}, []
        for i, (name, settings) in enumerate(NEIGHBOURS.items()):
            own = f"whisper-{keep}" + ("" if not settings else f"-neighbour-{i}")
            dense, small, folder = of_whisper(bench, own, keep, **settings)
            divergences[name], share = small.divergence or 0.0, bench.share(folder)
            shares.append(share)
            print(
                f"| {keep} | {name} | {share:.4f} | {small.divergence:.5f} | {row(dense, small, 'wer')} |", flush=True
            )
        *others, ours = divergences.values()
        bench.keep(f"neighbours at {keep}", {"divergences": divergences, "shares kept": shares})
        bench.bar(
            f"Whisper tiny.en at {keep}, {shares[-1]:.4f} kept: divergence over LiteASR's rule ({shares[0]:.4f} kept)",
            "≤ 0.1", f"{ours:.5f} over {others[0]:.5f}: {ours / others[0]:.4f}",
            ours <= 0.1 * others[0] and shares[-1] <= shares[0] + 0.005,
        )  # fmt: skip


def whisper_refined(bench: Bench) -> None:
    """Keep 0.6 of the encoder, and at most 15 minutes of refinement."""
    dense, small, folder = of_whisper(bench, "whisper-0.6-refined", 0.6, refine=bench.options.refine, minutes=15)
    spent = json.loads((folder / "run.json").read_text("utf-8"))["seconds"].get("refine", 0.0) / 60
    bench.bar(
        f"Whisper tiny.en, {bench.share(folder):.4f} of the encoder's linear weights, refined for {spent:.1f} minutes: WER",
        "≤ 1.10 × dense", row(dense, small, "wer"), small.scores["wer"] <= 1.10 * dense.scores["wer"] and spent <= 15.5,
    )  # fmt: skip


def whisper_speed(bench: Bench) -> None:
    """The encoder on 30 s of speech, dense and factored in turn, over what the multiplications would give."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import twofold

    # Products are served by vectors of eight numbers, so ranks are multiples of that (docs/speed.md).
    settings = {**SPEECH, "rank_multiple": 8}
    folder = bench.compressed("whisper-0.6-by-8", "whisper-tiny.en", "speech/calibration", 0.6, **settings)
    dense = twofold.load_model(str(bench.data / "whisper-tiny.en")).model.eval()
    small = twofold.optimize(twofold.load_model(str(folder)).model.eval(), quiet=True)
    frames = torch.randn(
        1, 80, 3000, generator=torch.Generator().manual_seed(0)
    )  # 30 s; speed does not depend on the numbers
    encoders = [model.get_encoder() for model in (dense, small)]

    def seconds(encoder: Any) -> float:
        start = time.perf_counter()
        encoder(frames)
        return time.perf_counter() - start

    with torch.inference_mode():
        dense.set_attn_implementation("eager")  # the counter knows its products; the timed runs have the default
        with FlopCounterMode(display=False) as counter:
            encoders[0](frames)
        dense.set_attn_implementation("sdpa")
        all_of_it, numbers = counter.get_total_flops() / 2, kept(folder)
        positions = dense.config.max_source_positions
        ideal = all_of_it / (all_of_it - positions * (numbers["before"] - numbers["after"]))
        times = []
        for i in range(bench.options.repeats + 1):
            pair = [(0, 1), (1, 0)][i % 2]
            spent = dict(zip(pair, [seconds(encoders[which]) for which in pair], strict=True))
            times.append((spent[0], spent[1]))
    ratios = [before / after for before, after in times[1:]]  # the first pair warms up
    gain = statistics.median(ratios)
    bench.keep("whisper speed", {
        "seconds": times[1:], "ratios": ratios, "speed-up": gain, "ideal": ideal, "multiplications": all_of_it,
        "of linear weights": positions * numbers["before"], "threads": torch.get_num_threads(),
    })  # fmt: skip
    bench.bar(
        f"Whisper tiny.en's encoder, {bench.share(folder):.4f} kept, 30 s of speech: speed-up over the ideal",
        "≥ 0.85", f"{gain:.3f} over {ideal:.3f}: {gain / ideal:.3f}", gain / ideal >= 0.85,
    )  # fmt: skip


def pairs_of_sts(bench: Bench) -> str:
    """The pairs of STS benchmark as rows; a path below the data's."""
    path = bench.out / "sts-test.jsonl"
    lines = (bench.data / "sts-test.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line]
    keys = ("score", "sentence1", "sentence2")
    made = [dict(zip(keys, (float(row[4]), row[5], row[6]), strict=True)) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(path)


def minilm(bench: Bench) -> None:
    """Sentences: keep 0.8 without training, and keep 0.6 refined."""
    runs = ((0.8, 0.985, {}), (0.6, 0.97, {"refine": bench.options.refine, "minutes": bench.options.minutes}))
    for keep, least, settings in runs:
        folder = bench.compressed(f"minilm-{keep}", "minilm", "sentences.txt", keep, **SENTENCES, **settings)
        columns = {"text_column": "sentence1", "target_column": "sentence2", "label_column": "score"}
        dense, small = bench.measured(folder, "minilm", pairs_of_sts(bench), **columns)
        ratio = small.scores["spearman"] / dense.scores["spearman"]
        way = "refined" if settings else "no training"
        bench.bar(f"MiniLM, {bench.share(folder):.4f} kept, {way}: Spearman's correlation on STS-B test",
                  f"≥ {least} × dense", row(dense, small, "spearman"), ratio >= least)  # fmt: skip


def images(bench: Bench) -> None:
    """A classifier of digits, and features of pictures."""
    for model, pictures, measure in (
        ("vit-digits", "digits", "accuracy"),
        ("dinov2-small", "stamps", "nearest_neighbour"),
    ):
        folder = bench.compressed(f"{model}-0.7", model, f"{pictures}/train", 0.7, **IMAGES)
        dense, small = bench.measured(folder, model, f"{pictures}/test")
        bench.bar(f"{model}, {bench.share(folder):.4f} kept: {measure.replace('_', ' ')} (agreement {small.agreement:.4f})",
                  "≥ 0.985 × dense", row(dense, small, measure),
                  small.scores[measure] >= 0.985 * dense.scores[measure])  # fmt: skip


def translation(bench: Bench) -> None:
    """A small Marian, compressed afterwards and factorized from the start."""
    settings = {"refine": bench.options.refine, "minutes": bench.options.minutes}
    after = bench.compressed(
        "translation-0.7", "translation/dense", "translation/train.jsonl", 0.7, **TRANSLATION, **settings
    )
    scratch = bench.data / "translation" / "scratch"
    for name, folder, least in (
        ("compressed afterwards, refined", after, 0.97),
        ("factorized from the start", scratch, 0.95),
    ):
        dense, small = bench.measured(folder, "translation/dense", "translation/test.jsonl", **PAIRS)
        share = f", {bench.share(folder):.4f} kept" if (folder / "plan.json").is_file() else ""
        bench.bar(f"translation, {name}{share}: BLEU (chrF {row(dense, small, 'chrf')})", f"≥ {least} × dense",
                  row(dense, small, "bleu"), small.scores["bleu"] >= least * dense.scores["bleu"])  # fmt: skip
    pairs = bench.data / "translation"
    command = [sys.executable, "steps.py", str(pairs), str(pairs / "dense"), str(scratch), "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT / "examples" / "translation", stdout=subprocess.PIPE, text=True, check=True)
    steps = json.loads(done.stdout.splitlines()[-1])
    bench.keep("translation steps", steps)
    ratio = steps["factorized_over_dense"]
    bench.bar(
        "translation, factorized from the start: time of a training step over dense", "< 1", f"{ratio:.3f}", ratio < 1
    )


def centred(bench: Bench) -> None:
    """Centred against uncentred moments at equal parameters, each real model with biases."""
    models: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
        "whisper-tiny.en": ("speech/calibration", "speech/test", SPEECH, {"samples": bench.options.clips}),
        "minilm": ("sentences.txt", "", SENTENCES, {"text_column": "sentence1", "target_column": "sentence2"}),
        "vit-digits": ("digits/train", "digits/test", IMAGES, {}),
        "dinov2-small": ("stamps/train", "stamps/test", IMAGES, {}),
        "translation/dense": ("translation/train.jsonl", "translation/test.jsonl", TRANSLATION, PAIRS),
    }
    for model in bench.options.models or models:
        calibration, test, settings, columns = models[model]
        for objective in bench.options.objectives:
            found, shares = {}, {}
            for centre in ("never", "always"):
                name = f"{model.replace('/', '-')}-0.7-{objective}-{centre}"
                how = {**settings, "objective": objective, "centre": centre}
                folder = bench.compressed(name, model, calibration, 0.7, **how)
                _, small = bench.measured(folder, model, test or pairs_of_sts(bench), **columns)
                found[centre], shares[centre] = small.divergence or 0.0, bench.share(folder)
            bench.keep(f"centred: {model}, {objective}", {"divergence": found, "shares kept": shares})
            same = abs(shares["always"] - shares["never"]) < 1e-3
            bench.bar(f"{model}, {objective}, keep 0.7: divergence centred over uncentred, equal parameters", "≤ 1",
                      f"{found['always']:.5f} over {found['never']:.5f}: {found['always'] / found['never']:.4f}",
                      same and found["always"] <= found["never"])  # fmt: skip


PARTS: dict[str, Callable[[Bench], None]] = {
    "whisper": whisper,
    "whisper-neighbours": whisper_neighbours,
    "whisper-refined": whisper_refined,
    "whisper-speed": whisper_speed,
    "minilm": minilm,
    "images": images,
    "translation": translation,
    "centred": centred,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*PARTS, "all"])
    parser.add_argument("--data", type=Path, required=True, help="the folder of models and data")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-output" / "families")
    parser.add_argument("--clips", type=int, help="of speech/test, the first ones; all of them without it")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.85, 0.7, 0.6], help="of whisper-neighbours")
    parser.add_argument("--objectives", nargs="+", default=["two-sided", "svd-llm"], help="of centred")
    parser.add_argument("--models", nargs="+", help="of centred; all of them without it")
    parser.add_argument("--refine", nargs="+", default=["distill"], help="how models are refined")
    parser.add_argument("--minutes", type=float, default=15, help="of refinement, but of Whisper, which has 15")
    parser.add_argument("--repeats", type=int, default=21, help="pairs of runs that are timed")
    bench = Bench(parser.parse_args())
    asked = list(PARTS) if "all" in bench.options.what else bench.options.what
    print("\n".join(table([])), flush=True)
    for name in asked:
        PARTS[name](bench)
    sys.exit(0 if all(bar.met for bar in bench.bars) else 1)


if __name__ == "__main__":
    main()
