"""How fast factored models are, each figure beside its bar: tokens a second, long prompts, and loading.

    make bench-speed                                                     # about 40 minutes on two idle cores
    python benchmarks/speed.py --runtimes eager --skip-large             # the built-in model alone
    python benchmarks/speed.py --hidden 256 --intermediate 704 --layers 2 --vocabulary 2000 --repeats 2 --skip-builtin

The large model is Llama-shaped with random weights, and its factors are random too, of uniform ranks at the share that is kept,
in the form that a run would store: speed depends on shapes and forms, and not on the numbers. The built-in model is factored by
plain SVD with uniform ranks. Both are timed by ``twofold bench``, dense and factored in turn. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from bars import Bar, table

if TYPE_CHECKING:
    from twofold.speed.record import Bench

ROOT = Path(__file__).resolve().parents[1]


def build_large(folder: Path, shape: argparse.Namespace) -> tuple[Path, Path]:
    """A Llama-shaped model with random weights, dense and factored, in two folders; those that are there already are taken."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from twofold.checkpoint.plugin import attach
    from twofold.linalg.gauge import gauge_rank
    from twofold.model.weights import list_weights
    from twofold.nn.layers.factored import FactoredLinear
    from twofold.nn.places import replace_module

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64, num_key_value_heads=max(shape.hidden // 512, 1),
        vocab_size=shape.vocabulary, max_position_embeddings=2048,
    )  # fmt: skip
    name = f"llama-{shape.hidden}-{shape.intermediate}-{shape.layers}-{shape.vocabulary}"
    dense, small = folder / name, folder / f"{name}-keep-{shape.keep}"
    if dense.is_dir() and small.is_dir():
        return dense, small
    for path in (dense, small):
        shutil.rmtree(path, ignore_errors=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.save_pretrained(dense)
    for target in list_weights(model).targets:
        m, n = target.out_features, target.in_features
        rank = gauge_rank(m, n, shape.keep * m * n)
        scale = (0.02 / rank**0.5) ** 0.5  # the weights of the product are as large as transformers' random ones
        left, right = torch.randn(m, rank) * scale, torch.randn(rank, n) * scale
        replace_module(model, target.name, FactoredLinear.from_factors(left, right))
    attach(model)
    model.save_pretrained(small)
    return dense, small


def build_builtin(folder: Path, keep: float) -> Path:
    """The built-in model factored by plain SVD with uniform ranks, in a folder; if it is there already it is taken."""
    import twofold

    out = folder / f"smollm2-keep-{keep}"
    if not out.is_dir():
        twofold.compress("smollm2", out, keep=keep, objective="svd", allocate="uniform", eval_windows=0, quiet=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench-output" / "speed", help="the models, records and table"
    )
    parser.add_argument(
        "--runtimes", default="eager,compile", help="of the built-in model; the first is that of the large"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--keep", type=float, default=0.5, help="of the large model")
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--skip-builtin", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    asked = parser.parse_args()

    from twofold.host.clock import Stopwatch
    from twofold.speed.bench import bench

    asked.out.mkdir(parents=True, exist_ok=True)
    runtimes = asked.runtimes.split(",")
    bars: list[Bar] = []
    watch = Stopwatch()
    results: list[Bench] = []

    def timed(name: str, against: str, models: list[str], chosen: list[str]) -> Bench:
        shutil.rmtree(asked.out / name, ignore_errors=True)
        result = bench(
            models,
            against=against,
            runtime=chosen,
            repeats=asked.repeats,
            memory=not asked.no_memory,
            out=asked.out / name,
        )
        results.append(result)
        return result

    if not asked.skip_large:
        with watch.stage("large"):
            dense, small = build_large(asked.out, asked)
            result = timed("large", str(dense), [str(small)], runtimes[:1])
        size = sum(path.stat().st_size for path in dense.glob("*.safetensors")) / 4e9
        words = f"{size:.2f} billion parameters, keep {asked.keep}, {runtimes[0]}"
        for what, least in (("decode 1", 0.90), ("prefill", 0.85)):
            bars.append(share_bar(result, what, least, words))
        bars += load_bars(result, words)
    if not asked.skip_builtin:
        keeps = (0.6, 0.9)
        with watch.stage("smollm2"):
            folders = {keep: str(build_builtin(asked.out, keep)) for keep in keeps}
            result = timed("smollm2", "smollm2", list(folders.values()), runtimes)
        best = max(
            (r for r in result.ratios if r.model == folders[0.6] and r.what == "decode 1"), key=lambda r: r.measured
        )
        bars.append(
            Bar(
                "SmolLM2, keep 0.6, decode, best runtime",
                "≥ 1.25 ×",
                f"{best.measured:.2f} × ({best.runtime}; ideal {best.ideal:.2f})",
                best.measured >= 1.25,
            )
        )
        for ratio in result.ratios:
            if ratio.runtime == "eager" and ratio.what in ("decode 1", "decode 8", "prefill"):
                keep = next(keep for keep, name in folders.items() if name == ratio.model)
                bars.append(
                    Bar(f"SmolLM2, keep {keep}, {ratio.what}, eager", "≥ 0.98 ×", f"{ratio.measured:.2f} ×",
                        ratio.measured >= 0.98)
                )  # fmt: skip
        bars += load_bars(result, "SmolLM2")
    lines = table(bars)
    machine = results[0].machine if results else None
    if machine is not None:
        lines += ["", f"{results[0].processor}, {machine.threads} threads, {machine.dtype}, torch {machine.torch}, "
                  f"transformers {machine.transformers}; medians of {asked.repeats} rounds in turn. "
                  f"{sum(watch.seconds.values()) / 60:.0f} minutes."]  # fmt: skip
    lines += [f"- {note}" for result in results for note in result.notes]
    text = "\n".join(lines)
    (asked.out / "speed.md").write_text(text + "\n", encoding="utf-8")
    (asked.out / "bars.json").write_text(json.dumps([vars(bar) for bar in bars], indent=1), encoding="utf-8")
    print(text)


def share_bar(result: Bench, what: str, least: float, words: str) -> Bar:
    """The speed-up of one measurement over the ideal one."""
    ratio = next(r for r in result.ratios if r.what == what)
    share = ratio.share or 0.0
    figure = f"{share:.2f} ({ratio.measured:.2f} × of {ratio.ideal:.2f})"
    return Bar(f"{what}, speed-up over the ideal: {words}", f"≥ {least:.2f}", figure, share >= least)


def load_bars(result: Bench, words: str) -> list[Bar]:
    """Time to load over that of the dense checkpoint, against bytes over bytes."""
    bars = []
    for ratio in result.ratios:
        if ratio.what == "load" and ratio.ideal is not None:
            most, taken = 1.2 / ratio.ideal, 1 / ratio.measured
            name = f"time to load over dense: {words}, {Path(ratio.model).name}, {ratio.runtime}"
            bars.append(Bar(name, f"≤ {most:.2f} ×", f"{taken:.2f} × (bytes {1 / ratio.ideal:.2f} ×)", taken <= most))
    return bars


if __name__ == "__main__":
    main()
