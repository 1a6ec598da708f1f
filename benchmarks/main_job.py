"""The main job on the built-in model: every figure of docs/benchmarks.md, each beside its bar.

    make bench                                   # about 20 minutes on two cores
    python benchmarks/main_job.py --windows 0    # perplexity over the whole test split instead of 16 windows

The commands that are timed run one after another, each in a process of its own, on moments that begin empty.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bars import Bar, table

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "wikitext-2-raw"
DENSE = 22.88  # perplexity of the original by the protocol, 16 windows


def command(*arguments: object, cache: Path) -> tuple[dict[str, Any], float]:
    """Run a subcommand that prints JSON, with its own moments; the record and the seconds of the whole process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "twofold", *map(str, arguments), "--json"],
        env={**os.environ, "TWOFOLD_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    record: dict[str, Any] = json.loads(done.stdout)
    return record, time.perf_counter() - start


def stored_numbers(folder: Path, modules: list[str]) -> tuple[int, int]:
    """The floating-point numbers in the safetensors of a folder: those of the given modules' weights, and all."""
    from safetensors import safe_open

    ours, total = 0, 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                if view.get_dtype().startswith("I"):
                    continue
                count = 1
                for size in view.get_shape():
                    count *= size
                total += count
                ours += count if any(name.startswith(f"{m}.") for m in modules) else 0
    return ours, total


def relative_logits(keep: float, cache: Path, train: Path, **settings: Any) -> tuple[bool, float]:
    """Factorize in this process: are saved and reloaded logits equal to the bit, and how far are they from the original's."""
    os.environ["TWOFOLD_CACHE"] = str(cache)
    import torch
    from transformers import AutoModelForCausalLM

    import twofold
    from twofold.model.builtin import smollm2_folder

    ids = torch.arange(300, 428)[None]
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(smollm2_folder())(input_ids=ids).logits
        model = twofold.factorize("smollm2", keep=keep, calibration=str(train), quiet=True, **settings)
        here = model(input_ids=ids).logits
        folder = cache / "reload"
        model.save_pretrained(folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    shutil.rmtree(folder)
    return bool(torch.equal(here, reloaded)), float((here - original).norm() / original.norm())


def main_job(out: Path, data: Path, windows: int, tokens: int = 65536) -> list[Bar]:
    """Run the main job at keep 0.8 and 0.6 and hold each figure against its bar."""
    from twofold.model.builtin import FOLDER, smollm2_folder

    train, test = data / "wiki.train.part.raw", data / "wiki.test.raw"
    cache = out / "cache"
    shutil.rmtree(out, ignore_errors=True)
    cache.mkdir(parents=True)
    (cache / FOLDER).symlink_to(smollm2_folder().resolve())  # the model is fetched once, the moments begin empty
    flags = [
        "--calibration",
        train,
        "--tokens",
        tokens,
        "--objective",
        "two-sided",
        "--allocate",
        "global",
        "--seed",
        0,
    ]
    bars: list[Bar] = []
    seconds: dict[float, float] = {}
    for keep, most in ((0.8, 1.18), (0.6, 2.05)):
        folder = out / f"keep-{keep}"
        run, seconds[keep] = command(
            "compress", "smollm2", "--keep", keep, *flags, "--out", folder, "--quiet", cache=cache
        )
        (out / f"run-{keep}.json").write_text(json.dumps(run, indent=1))
        result, _ = command(
            "eval", folder, "--against", "smollm2", "--text", test, "--windows", windows, "--quiet", cache=cache
        )
        (out / f"eval-{keep}.json").write_text(json.dumps(result, indent=1))
        dense, small = result["models"]
        ratio = small["perplexity"] / dense["perplexity"]
        bars.append(
            Bar(f"perplexity at keep {keep} over dense ({dense['perplexity']:.2f})", f"≤ {most}",
                f"{small['perplexity']:.2f}, {ratio:.4f} ×", ratio <= most)
        )  # fmt: skip
        plan = json.loads((folder / "plan.json").read_text())
        names = [entry["name"] for entry in plan["entries"]]
        before = sum(entry["numbers_before"] for entry in plan["entries"])
        ours, total = stored_numbers(folder, names)
        _, dense_total = stored_numbers(smollm2_folder(), [])
        fewer = dense_total - total
        bars.append(
            Bar(f"numbers stored over the targeted weights, keep {keep}", "± 0.5 %, the file smaller by as many",
                f"{ours / before:.4%}; the file holds {fewer:,} fewer, the weights {before - ours:,}",
                abs(ours / before - keep) <= 0.005 and fewer == before - ours)
        )  # fmt: skip
        worst = max(
            abs(e["measured_loss"] / e["predicted_loss"] - 1)
            for e in plan["entries"]
            if e["rank"] and e["predicted_loss"]
        )
        bars.append(
            Bar(f"loss predicted against measured, worst layer, keep {keep}", "≤ 0.1 %", f"{worst:.1e}", worst <= 1e-3)
        )
        if keep == 0.8:
            spent = run["seconds"]
            share = seconds[keep] / spent["calibrate"]
            bars.append(
                Bar("time of the run over that of its calibration", "≤ 1.5",
                    f"{share:.2f} ({seconds[keep]:.0f} s over {spent['calibrate']:.0f} s)", share <= 1.5)
            )  # fmt: skip
            bars.append(
                Bar(
                    "peak resident memory",
                    "≤ 4 GiB",
                    f"{run['peak_memory'] / 2**30:.2f} GiB",
                    run["peak_memory"] <= 4 * 2**30,
                )
            )
        else:
            fits = seconds[keep] < 90 and run["moments_reused"] and "calibrate" not in run["seconds"]
            bars.append(
                Bar("a second budget on the same moments", "< 90 s, no calibration", f"{seconds[keep]:.0f} s", fits)
            )
    equal, _ = relative_logits(0.8, cache, train, tokens=tokens)
    bars.append(
        Bar("saved and reloaded against in memory", "equal to the bit", "equal" if equal else "different", equal)
    )
    for allocate in ("uniform", "global"):
        _, error = relative_logits(1.0, cache, train, tokens=tokens, allocate=allocate)
        bars.append(Bar(f"full rank (keep 1.0, {allocate}), logits", "≤ 1e-4 relative", f"{error:.1e}", error <= 1e-4))
    return bars


def markdown(bars: list[Bar], windows: int) -> str:
    """The table of docs/benchmarks.md."""
    import torch
    import transformers

    import twofold

    lines = table(bars)
    text = "the whole test split" if windows == 0 else f"{windows} windows of 1,024 tokens of the test split"
    lines += [
        "",
        f"SmolLM2-135M-Instruct (from its Q4_1 GGUF), float32, WikiText-2, {text}; calibrated on the first 65,536 tokens of "
        f"wiki.train.part.raw, seed 0. {torch.get_num_threads()} threads, {platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"twofold {twofold.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-output")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--windows", type=int, default=16)
    given = parser.parse_args()
    if not (given.data / "wiki.test.raw").is_file():
        sys.exit(f"WikiText-2 raw is not in {given.data}; name its folder with --data")
    bars = main_job(given.out.resolve(), given.data, given.windows)
    text = markdown(bars, given.windows)
    (given.out / "main_job.md").write_text(text)
    print(text)
    sys.exit(0 if all(bar.met for bar in bars) else 1)


if __name__ == "__main__":
    main()
