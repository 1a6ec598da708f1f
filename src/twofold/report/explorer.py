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
from twofold.evidence.beside import WIDTHS, Beside
from twofold.planning.make import Problem
from twofold.planning.menu import PlanRequest
from twofold.planning.plan import Plan, PlanEntry
from twofold.planning.settings import SIZES
from twofold.planning.storage import Storage
from twofold.recipe import Recipe
from twofold.report.kinds import kind_labels, loss_of
from twofold.report.names import model_title, public_recipe

VERSION = 1
STORED = re.compile(r'<script type="application/json" id="explorer-data">(.*?)</script>', re.DOTALL)
MOST = 150_000  # choices of all weights: each takes some eleven bytes of the page
POINTS = 64  # of a spectrum that is shown and not planned from


def explorer_data(
    request: PlanRequest, plan: Plan, recipe: Recipe, beside: Beside | None = None
) -> dict[str, Any] | None:
    """Return what the page plans from, ready for JSON; None where it can't plan as the program does.

    ``numbers`` is one block of float64, deflated and in base64. It has for each weight the ranks, bits (0: in the dtype of the
    checkpoint), costs, numbers and bytes of its choices, each as second differences, which are mostly zero, and their losses.

    Args:
        beside: what is shown beside the plan, if it was measured.
    """
    if recipe.allocate != "global" or recipe.latency is not None or recipe.corrects or not plan.entries:
        return None
    problem, beside = Problem.of(request), beside or Beside()
    labels = kind_labels(plan)
    thin = -(-sum(len(candidate.ranks) for candidate in problem.candidates) // MOST)
    weights, block = [], list[NDArray[np.float64]]()
    for candidate in problem.candidates:
        at = thinned(len(candidate.ranks), thin)
        weights.append(_weight(problem, candidate, at, plan, labels))
        block += _columns(problem, candidate, at, plan)
    return {
        "version": VERSION,
        "model": model_title(plan.model),
        "prediction": plan.prediction,
        "nats": loss_of(plan).additive,
        "unit": "bytes" if recipe.in_bytes else "numbers",
        "thin": thin,
        "rest": {"numbers": plan.dense_numbers, "bytes": plan.dense_bytes},
        "before": {"numbers": plan.target_before, "bytes": plan.target_bytes_before},
        "amount": problem.amount,
        "recipe": _without_size(public_recipe(recipe)),
        "weights": weights,
        "numbers": base64.b64encode(zlib.compress(np.concatenate(block).astype("<f8").tobytes(), 9)).decode("ascii"),
        "spectra": {
            metric: {name: _shares(values) for name, values in some.items()} for metric, some in beside.spectra.items()
        },
        "integers": [_integers(bits, plan, recipe, beside) for bits in WIDTHS],
    }


def _weight(
    problem: Problem, candidate: Candidate, at: NDArray[np.int64], plan: Plan, labels: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the page says of one weight, or of several that are cut together."""
    entries = problem.menu.entries(candidate, Choice(int(at[0]) if len(at) else None))
    dense, forced = None, problem.menu.forced.get(candidate.name)
    if candidate.dense_cost is not None:
        _, numbers, size = _stored(problem, candidate, Choice(None), plan)
        dense = {"cost": candidate.dense_cost, "numbers": numbers, "bytes": size}
    return {
        "names": [entry.name for entry in entries],
        "kind": labels[entries[0].name],
        "stack": entries[0].stack,
        "layer": entries[0].layer,
        "shape": [entries[0].out_features, entries[0].in_features],
        "full": candidate.full_cost,
        "total": _total(entries, candidate),
        "dense": dense,
        "choices": len(at),
        "forced": None if forced is None else {"index": _nearest(at, forced)},
    }


def _columns(
    problem: Problem, candidate: Candidate, at: NDArray[np.int64], plan: Plan
) -> list[NDArray[np.float64]]:  # (len(at),) each
    """Return the ranks, bits, costs, numbers and bytes of some choices, twice differenced, and their losses."""
    stored = [_stored(problem, candidate, Choice(int(i)), plan) for i in at]
    bits, numbers, size = np.array(stored, dtype=np.float64).reshape(len(at), 3).T
    whole = (candidate.ranks[at], bits, candidate.costs[at], numbers, size)
    return [*(_twice_differenced(column) for column in whole), candidate.losses[at]]


def _shares(values: NDArray[np.float64]) -> dict[str, Any]:
    """Return a spectrum as shares of its sum at some places, closest at its beginning, and the rank that holds 99 % of it."""
    places = np.unique(np.geomspace(1, len(values), POINTS).round().astype(int))
    total = float(values.sum()) or 1.0
    shares = [float(f"{values[place - 1] / total:.4g}") for place in places]
    most = int(np.searchsorted(np.cumsum(values), 0.99 * total)) + 1
    return {"places": places.tolist(), "shares": shares, "most": min(most, len(values)), "full": len(values)}


def _integers(bits: int, plan: Plan, recipe: Recipe, beside: Beside) -> dict[str, Any]:
    """Return the size of the model with its dense weights in integers, and what that loses if it is known."""
    storage = Storage(recipe, plan.element_bytes, bits)
    size = plan.dense_bytes + sum(storage.bytes(entry, None) for entry in plan.entries)
    return {"bits": bits, "bytes": size, "lost": beside.rounded.get(bits)}


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
