"""README.md: the model card of a factored checkpoint. It tells no folder of the machine that it was made on."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData

from twofold.checkpoint.beside import Licence
from twofold.model.builtin import ALIAS
from twofold.planning.plan import Plan
from twofold.report.formats import count
from twofold.report.kinds import made_of
from twofold.report.names import ALIAS_LICENSE, base_model, model_title, public_recipe, without_paths
from twofold.report.record import Run
from twofold.report.tables import TextTable, quality_table, size_table
from twofold.task import TASKS

CAUSAL = "AutoModelForCausalLM"
HEADS = ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
AUTO_CLASSES = {"LMHeadModel": CAUSAL, **{head: f"AutoModel{head}" for head in HEADS}}  # by the end of an architecture


def write_card(folder: Path, run: Run, plan: Plan) -> None:
    """Write folder/README.md: YAML front matter, then Markdown.

    The class to load with comes from folder/config.json if there is one.
    """
    auto_class = _auto_class(folder, run)
    data = ModelCardData(
        library_name="transformers",
        base_model=base_model(plan.model),
        **({"license": ALIAS_LICENSE} if plan.model == ALIAS else run.licence),  # type: ignore[arg-type]
        tags=["twofold", "low-rank", "factorized"],
        pipeline_tag="text-generation" if auto_class == CAUSAL else _pipeline(run),
    )
    title = model_title(plan.model)
    factored = sum(entry.rank is not None for entry in plan.entries)
    m, shown = run.machine, public_recipe(run.recipe)
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {_words(title)}, factorized",
        f"{_words(title)} with {count(factored)} of its weights as {made_of(plan)}, made by "
        f"Twofold {m.twofold}. `report.html` shows every rank and why it was chosen; `plan.json`, `recipe.yaml` and `run.json` "
        "are the record.",
        "## How to load it",
        "```python\n"
        "import twofold  # lets transformers load the factored layers\n"
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("this folder or repository")\n'
        "```",
        "Without `import twofold` transformers can't load it: it stops with an error that the shapes of the weights do "
        "not match. That is on purpose; a model with random weights would be worse.",
        "## Size",
        _markdown(size_table(plan)),
        "## Quality",
        *_quality(run),
        "## How it was made",
        _fenced(shown.to_yaml(), "yaml"),
        f"- versions: twofold {m.twofold}, transformers {m.transformers}, torch {m.torch}, Python {m.python}\n"
        f"- machine: {_words(m.system)}, {_words(m.device)}, {m.threads} threads, {m.dtype}\n"
        f"- seed: {run.recipe.seed}\n"
        f"- calibration: {_words(without_paths(run.calibration))}, {count(run.calibration_tokens)} {run.unit}"
        + (
            f", SHA-256 of the {'token ids' if run.unit == 'tokens' else run.unit} `{run.calibration_sha256}`"
            if run.calibration_sha256
            else ""
        )
        + (f"; each window begins with `{run.windows_begin}`" if run.windows_begin else ""),
        *(["\n".join(f"- {_words(step.words)}" for step in run.refinement)] if run.refinement else []),
        *(["Paths in the recipe are shortened to their last part."] if shown != run.recipe else []),
        "## Limits",
        *_limits(run),
        *files_and_licence(run.carried, run.licence),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _quality(run: Run) -> list[str]:
    if run.quality is None:
        return ["It was not measured in this run."]
    q = run.quality
    return [
        f"Measured on {_words(without_paths(q.text))}, {q.words}, each scored alone:",
        _markdown(quality_table(run, q)),
        "The predicted divergence is a second-order, Kronecker-factored estimate from the calibration moments: it "
        "compares ranks, and does not foretell quality.",
    ]


def _limits(run: Run) -> list[str]:
    data, yours = ("text", "text of your own") if run.unit == "tokens" else ("data set", "data of your own")
    words = [f"A factored model answers worse than its original; the table above says by how much, on one {data}."]
    if run.calibration_tokens:
        words.append(
            f"The ranks and factors fit the calibration {data}. What is calibrated on one domain loses more in another: "
            f"measure on {yours} before use, or factorize anew with it as the calibration."
        )
    words.append("The limits and the licence of the original model hold for this one too.")
    return ["\n".join(f"- {sentence}" for sentence in words)]


def files_and_licence(carried: list[str], licence: Licence) -> list[str]:
    """Tell, in a card, the licence of the original and which files of it stand beside the weights."""
    said = []
    if licence:
        name, place = _several(licence.get("license_name") or licence["license"]), licence.get("license_link")
        said.append(f"The licence of the original is {name}{f' ({_several(place)})' if place else ''}.")
    if carried:
        said.append(f"Carried along from the original as they are: {', '.join(map(_words, carried))}.")
    return ["## Files and licence", " ".join(said)] if said else []


def _several(value: str | list[str]) -> str:
    return _words(value if isinstance(value, str) else ", ".join(value))


def _pipeline(run: Run) -> str | None:
    """Return what the model hub calls the task of a run; None where it has no word for it."""
    return TASKS.get(run.task).pipeline if run.task in TASKS.names() else None


def _auto_class(folder: Path, run: Run) -> str:
    """Return the class to load with: an Auto class where one fits, else the architecture itself."""
    try:
        architecture = str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return CAUSAL if run.samples else "AutoModel"
    name = next((auto for head, auto in AUTO_CLASSES.items() if architecture.endswith(head)), architecture)
    return name if name.isidentifier() else "AutoModel"


def _words(text: str) -> str:
    """Return text as Markdown that means nothing but itself."""
    return re.sub(r"([\\`*_~$\[\]|#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _markdown(table: TextTable) -> str:
    rule = ["---" if i < table.left else "---:" for i in range(len(table.columns))]
    rows = [[_words(cell) for cell in row] for row in (table.columns, *table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def _fenced(text: str, language: str) -> str:
    """Return a code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"
