"""What the live part of the page plans anew from: each weight's choices, their costs and losses, as web/src/data.ts reads them.

The page has the program's own candidates, in float64, and its own allocation, so that it comes to the program's ranks.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from twofold.allocate import Candidate, Choice
from twofold.planning.make import Problem
from twofold.planning.plan import Plan, PlanEntry
from twofold.planning.settings import SIZES
from twofold.recipe import Recipe
from twofold.report.kinds import kind_labels, loss_of
from twofold.report.names import model_title, public_recipe

VERSION = 1
STORED = re.compile(r'<script type="application/json" id="explorer-data">(.*?)</script>', re.DOTALL)
MOST = 150_000  # choices of all weights: each takes some eleven bytes of the page


def explorer_data(problem: Problem, plan: Plan, recipe: Recipe) -> dict[str, Any] | None:
    """Return what the page plans from, ready for JSON; None where it can't plan as the program does.

    ``numbers`` is one block of float64, deflated and in base64. It has for each weight the ranks, bits (0: in the dtype of the
    checkpoint), costs, numbers and bytes of its choices, each as second differences, which are mostly zero, and their losses.
    """
    if recipe.allocate != "global" or recipe.latency is not None or not problem.candidates:
        return None
    loss, labels = loss_of(plan), kind_labels(plan)
    thin = -(-sum(len(candidate.ranks) for candidate in problem.candidates) // MOST)
    weights, block = [], list[NDArray[np.float64]]()
    for candidate in problem.candidates:
        at = thinned(len(candidate.ranks), thin)
        stored = [_stored(problem, candidate, Choice(int(i)), plan) for i in at]
        whole = [] if candidate.dense_cost is None else [_stored(problem, candidate, Choice(None), plan)]
        entries = problem.menu.entries(candidate, Choice(int(at[0]) if len(at) else None))
        forced = problem.menu.forced.get(candidate.name)
        columns = [candidate.ranks[at], *np.array(stored, dtype=np.float64).reshape(len(at), 3).T]
        block += [_twice_differenced(column) for column in (columns[0], columns[1], candidate.costs[at], *columns[2:])]
        block.append(candidate.losses[at])
        weights.append({
            "names": [entry.name for entry in entries],
            "kind": labels[entries[0].name],
            "stack": entries[0].stack,
            "layer": entries[0].layer,
            "shape": [entries[0].out_features, entries[0].in_features],
            "full": candidate.full_cost,
            "total": _total(entries, candidate),
            "dense": None if not whole else {"cost": candidate.dense_cost, "numbers": whole[0][1], "bytes": whole[0][2]},
            "choices": len(at),
            "forced": None if forced is None else {"index": _nearest(at, forced)},
        })  # fmt: skip
    return {
        "version": VERSION,
        "model": model_title(plan.model),
        "prediction": plan.prediction,
        "nats": loss.additive,
        "unit": "bytes" if recipe.in_bytes else "numbers",
        "thin": thin,
        "rest": {"numbers": plan.dense_numbers, "bytes": plan.dense_bytes},
        "before": {"numbers": plan.target_before, "bytes": plan.target_bytes_before},
        "amount": problem.amount,
        "recipe": _without_size(public_recipe(recipe)),
        "weights": weights,
        "numbers": base64.b64encode(zlib.compress(np.concatenate(block).astype("<f8").tobytes(), 9)).decode("ascii"),
    }


def embedded(data: Mapping[str, Any]) -> Markup:
    """Return JSON that can stand in an element of the page: nothing in it ends the element or begins another."""
    text = json.dumps(data, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def stored_data(path: Path) -> dict[str, Any] | None:
    """Read from a page what it plans anew from; None where there is no page, or it plans nothing."""
    try:
        data = json.loads(STORED.search(path.read_text(encoding="utf-8"))[1])  # type: ignore[index]
    except (OSError, ValueError, TypeError):
        return None
    return data if isinstance(data, dict) else None


def thinned(length: int, step: int) -> NDArray[np.int64]:
    """Return the places of every ``step``-th choice, and of the first and the last."""
    return np.unique(np.append(np.arange(0, length, step), max(length - 1, 0)))[:length]


def _stored(problem: Problem, candidate: Candidate, choice: Choice, plan: Plan) -> tuple[int, int, int]:
    """Return the bits, the numbers and the bytes that a choice stores."""
    entries = problem.menu.entries(candidate, choice)
    return entries[0].bits or 0, sum(e.numbers_after for e in entries), sum(plan.stored_bytes(e) for e in entries)


def _total(entries: Iterable[PlanEntry], candidate: Candidate) -> float | None:
    """Return what there is to lose, in the unit of the candidate's losses."""
    total = sum(entry.total_loss or 0.0 for entry in entries)
    lost = sum(entry.predicted_loss or 0.0 for entry in entries)
    return total * float(candidate.losses[0]) / lost if lost and len(candidate.losses) else None


def _nearest(at: NDArray[np.int64], choice: Choice) -> int | None:
    return None if choice.index is None else int(np.searchsorted(at, choice.index))


def _twice_differenced(column: NDArray[Any]) -> NDArray[np.float64]:
    return np.diff(np.asarray(column, dtype=np.float64), n=2, prepend=[0.0, 0.0])


def _without_size(recipe: Recipe) -> str:
    """Return a recipe as YAML, without the line that says how small the model becomes."""
    lines = recipe.to_yaml().splitlines()
    return "\n".join(line for line in lines if not line.startswith(tuple(f"{size}:" for size in SIZES)))
