"""The page's sentences: what was done, how good the estimate is, and why some kinds keep more than others."""

from __future__ import annotations

from collections import Counter
from operator import attrgetter, itemgetter

from twofold.allocate import ALLOCATIONS
from twofold.objectives import OBJECTIVES
from twofold.planning.plan import Plan, PlanEntry
from twofold.recipe import Recipe
from twofold.report.formats import count, fraction, megabytes, millions, number, percent
from twofold.report.kinds import Group, SpectraValues, by_kind, by_layer, energy_rank, loss_at_share, loss_of, made_of
from twofold.report.names import model_title, without_paths
from twofold.report.record import Run
from twofold.report.scatter import compared

EVEN = 0.02  # kinds whose kept shares differ by less are called equal


def summary_text(run: Run | None, plan: Plan) -> str:
    """Say what became of the model, or would become of it, in one paragraph."""
    factored, every = sum(entry.rank is not None for entry in plan.entries), len(plan.entries)
    name = model_title(plan.model)
    widths = Counter(e.bits for entries in (plan.entries, plan.dense) for e in entries if e.bits is not None)
    each = ", ".join(f"{count(widths[bits])} of {bits} bits" for bits in sorted(widths))
    integers = f" Weights stored as integers, with their scales: {each}." if each else ""
    if not factored:
        return f"{name} {'is' if run is None else 'was'} left as it is: none of its {count(every)} weights is factorized.{integers}"
    which = f"all {count(every)} weights" if factored == every else f"{count(factored)} of the {count(every)} weights"
    became = "was factorized: {} that could be are now" if run else "is not changed by a plan: {} that can be would be"
    words = (
        f"{name} {became.format(which)} {made_of(plan)}. These weights keep "
        f"{percent(plan.keep)} of their parameters; the whole model keeps {percent(plan.keep_model)}, and takes "
        f"{megabytes(plan.bytes_after)} instead of {megabytes(plan.bytes_before)}.{integers}"
    )
    if run is None:
        return words
    if run.quality is None:
        return f"{words} Its quality was not measured."
    q = run.quality
    before, after = q.original.get("perplexity"), q.factored.get("perplexity")
    text = without_paths(q.text)
    if before is None:
        scores = ((name.replace("_", " "), *both) for name, both in q.scores.items())
        measured = "".join(
            f"its {name} goes from {number(old, 4)} to {number(new, 4)}, and " for name, old, new in scores
        )
        apart = f"{number(q.factored.get('divergence'))} nats per {q.prediction}"
        return f"{words} On {text} {measured}it is {apart} from the original."
    times = f" ({number(q.ratio)}\u00a0×)" if q.ratio is not None else ""
    return f"{words} On {text} its perplexity goes from {number(before, 4)} to {number(after, 4)}{times}."


def quality_text(run: Run | None) -> str:
    """Say on what text the quality was measured."""
    if run is None:
        return "A plan measures no quality; compress does."
    if run.quality is None:
        return "The quality was not measured in this run."
    q = run.quality
    read, said, predicted = "same tokens", "next-token distribution", "predicted tokens"
    if q.prediction != "token":
        read, said, predicted = "same samples", "predictions", f"{q.prediction}s"
    return (
        f"Both models read the {read} of {without_paths(q.text)}: {q.words}, each scored alone, "
        f"{count(int(q.factored.get('tokens') or 0))} {predicted}. Divergence is the Kullback–Leibler divergence of the factored "
        f"model's {said} from the original's."
    )


def estimate_text(run: Run | None, plan: Plan) -> list[str]:
    """Say what the predicted divergence is, and how far it is from what was measured."""
    if plan.predicted_divergence is None:
        able = " or ".join(objective.name for objective in OBJECTIVES.all() if objective.loss == "nats")
        return [f"No divergence is predicted: that takes a loss in nats for every weight, from the {able} objective."]
    words = [
        "The predicted divergence is half the sum of the σ² left out. It is a second-order estimate: the curvature of "
        "the loss at each weight is taken as the Kronecker product of an input and a gradient moment, each weight is "
        "taken by itself, and both moments come from the calibration tokens. What errors in many layers do together, "
        "and text unlike the calibration, are not in it. It serves to compare ranks, not to foretell quality."
    ]
    measured = None if run is None or run.quality is None else run.quality.factored.get("divergence")
    if measured is not None and plan.predicted_divergence > 0:
        times = number(measured / plan.predicted_divergence)
        words.append(f"Here the measured divergence is {times} times the predicted one.")
    return words


def check_text(plan: Plan) -> str:
    """Say how far the stored factors are from their prediction."""
    pairs = compared(plan)
    if not pairs:
        return "No weight has both a predicted loss and one measured from its factors."
    difference, entry = max(((abs(measured / lost - 1), e) for e, lost, measured in pairs), key=itemgetter(0))
    known = sum(e.rank is not None and e.measured_loss is not None and bool(e.total_loss) for e in plan.entries)
    exact = known - len(pairs)
    return (
        f"The largest relative difference over {count(len(pairs))} weights is {number(difference, 2)}, at {entry.name}. "
        + (f"{count(exact)} more lose nothing beyond rounding and are not shown. " if exact else "")
        + "This checks the arithmetic: the stored factors lose what their spectrum said, in the metric of the "
        "calibration. It does not check the estimate itself; the measured divergence does."
        + (
            " What is measured of weights of integers has the loss of rounding in it; what is predicted has it only where "
            "bits were chosen together with ranks."
            if plan.integers
            else ""
        )
    )


def reasons_text(recipe: Recipe, plan: Plan, spectra: SpectraValues) -> list[str]:
    """Say what the allocation did, in a few sentences."""
    if ALLOCATIONS.get(plan.allocate).blind:
        words = [
            f"The {plan.allocate} allocation gives every weight the same share of its parameters; no loss was weighed."
        ]
    else:
        additive = loss_of(plan).additive
        lost = "as little predicted loss" if additive else "as little of each weight's own Σσ²"
        words = [
            f"The {plan.allocate} allocation solves one problem over all weights: to leave out {lost} as the budget "
            "allows. In its solution one more stored parameter saves about as much in every weight. So a weight keeps much "
            "where its spectrum falls slowly" + (", or where the loss is sensitive to its output." if additive else ".")
        ]
        even = None if plan.integers else _at_average(plan.entries, recipe, plan, spectra)
        if even is not None and plan.predicted_divergence is not None:
            words.append(
                f"Had every weight kept the same {percent(plan.keep)}, the predicted divergence would be {number(even)} "
                f"nats per {plan.prediction}; as allocated it is {number(plan.predicted_divergence)}."
            )
    layers = sorted((g for g in by_layer(plan) if g.entries[0].layer is not None), key=attrgetter("keep"))
    if layers and layers[-1].keep - layers[0].keep > EVEN:
        least, most = layers[0], max(layers, key=attrgetter("keep"))
        words.append(
            f"By depth, layer {least.label} keeps least ({percent(least.keep)}) and layer {most.label} most "
            f"({percent(most.keep)})."
        )
    return words


def _at_average(entries: list[PlanEntry], recipe: Recipe, plan: Plan, spectra: SpectraValues) -> float | None:
    """Return the loss of some weights if each kept the average share; None where losses have no common scale."""
    loss = loss_of(plan)
    if not (loss.known and loss.additive):
        return None
    lost = loss_at_share(entries, spectra, plan.keep, recipe.form == "plain")
    return None if lost is None else loss.factor * lost


def kind_reasons(recipe: Recipe, plan: Plan, spectra: SpectraValues) -> list[tuple[str, list[tuple[str, str]]]]:
    """Say of the kinds that were cut most and least what their spectra tell; nothing if none was chosen over another."""
    kinds = sorted(by_kind(plan), key=attrgetter("keep"))
    if ALLOCATIONS.get(plan.allocate).blind or len(kinds) < 2 or kinds[-1].keep - kinds[0].keep < EVEN:
        return []
    size = min(3, len(kinds) // 2)
    return [
        (title, [(group.label, _kind_reason(group, recipe, plan, spectra)) for group in groups])
        for title, groups in (("Cut most", kinds[:size]), ("Cut least", kinds[: -size - 1 : -1]))
    ]


def _kind_reason(group: Group, recipe: Recipe, plan: Plan, spectra: SpectraValues) -> str:
    """Say what one kind keeps and loses, and what that saves or costs against the average share."""
    loss = loss_of(plan)
    lost = sum(entry.predicted_loss or 0.0 for entry in plan.entries)
    words = (
        f"keeps {percent(group.keep)}. It was {percent(fraction(group.before, plan.target_before))} of the parameters"
    )
    if loss.known and loss.additive and lost:
        words += f" and carries {percent(group.lost / lost)} of the predicted loss"
    elif loss.known and not loss.additive and group.total:
        words += f" and leaves out {percent(group.shown(loss), 2)} of its Σσ²"
    words += "."
    needed = energy_rank(group.entries, spectra)
    if needed is not None:
        words += f" On average 99\u00a0% of its Σσ² sits in the first {percent(needed, 0)} of its ranks."
    even = _at_average(group.entries, recipe, plan, spectra)
    if even is None:
        return words
    more = group.after - plan.keep * group.before
    saved = even - group.shown(loss)
    return (
        f"{words} Against the average share of {percent(plan.keep)} this {'takes' if more >= 0 else 'frees'} "
        f"{millions(abs(more))} parameters and {'saves' if saved >= 0 else 'costs'} {number(abs(saved))} nats per "
        f"{plan.prediction}."
    )
