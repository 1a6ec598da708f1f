"""The page's sentences: what was done, how good the estimate is, and why some kinds keep more than others."""

from __future__ import annotations

from collections import Counter

from twofold.planning.plan import Plan, PlanEntry
from twofold.report.formats import count, megabytes, millions, number, percent, share
from twofold.report.kinds import Group, Spectra, by_kind, by_layer, loss_at_share, loss_of, made_of, spread
from twofold.report.names import model_title, without_paths
from twofold.report.record import Run
from twofold.report.scatter import compared, largest_difference
from twofold.report.tables import ratio

EVEN = 0.02  # kinds whose kept shares differ by less are called equal


def summary(run: Run, plan: Plan) -> str:
    """What became of the model, in one paragraph."""
    factored, every = sum(entry.rank is not None for entry in plan.entries), len(plan.entries)
    name = model_title(plan.model)
    if not factored:
        left = f"{name} was left as it is: none of its {count(every)} weights is factorized."
        return f"{left} {integers_text(plan)}" if plan.integers else left
    which = f"all {count(every)} weights" if factored == every else f"{count(factored)} of the {count(every)} weights"
    words = (
        f"{name} was factorized: {which} that could be are now {made_of(plan)}. These weights keep "
        f"{percent(share(plan.target_after, plan.target_before))} of their parameters; the whole model keeps "
        f"{percent(share(plan.model_after, plan.model_before))}, and takes {megabytes(plan.bytes_after)} instead of "
        f"{megabytes(plan.bytes_before)}."
    )
    if plan.integers:
        words += f" {integers_text(plan)}"
    if run.quality is None:
        return f"{words} Its quality was not measured."
    before, after = run.quality.original.get("perplexity"), run.quality.factored.get("perplexity")
    times = ratio(run.quality)
    return (
        f"{words} On {without_paths(run.quality.text)} its perplexity goes from {number(before, 4)} to "
        f"{number(after, 4)}" + (f" ({number(times)}\u00a0×)." if times is not None else ".")
    )


def integers_text(plan: Plan) -> str:
    """How many weights are stored in how many bits."""
    every = [entry.bits for entry in plan.entries] + [entry.bits for entry in plan.dense]
    found = Counter(bits for bits in every if bits is not None)
    each = ", ".join(f"{count(found[bits])} of {bits} bits" for bits in sorted(found))
    return f"Weights stored as integers, with their scales: {each}."


def quality_text(run: Run) -> str:
    """On what text the quality was measured."""
    if run.quality is None:
        return "The quality was not measured in this run."
    q = run.quality
    return (
        f"Both models read the same tokens of {without_paths(q.text)}: {count(q.windows)} windows of {count(q.window)} "
        f"tokens, each scored alone, {count(int(q.factored.get('tokens') or 0))} predicted tokens. Divergence is the "
        "Kullback–Leibler divergence of the factored model's next-token distribution from the original's."
    )


def estimate_text(run: Run) -> list[str]:
    """What the predicted divergence is, and how far it is from what was measured."""
    if run.predicted_divergence is None:
        return ["No divergence is predicted: that takes a loss in nats for every weight, from the two-sided objective."]
    words = [
        "The predicted divergence is half the sum of the σ² left out. It is a second-order estimate: the curvature of "
        "the loss at each weight is taken as the Kronecker product of an input and a gradient moment, each weight is "
        "taken by itself, and both moments come from the calibration tokens. What errors in many layers do together, "
        "and text unlike the calibration, are not in it. It serves to compare ranks, not to foretell quality."
    ]
    measured = None if run.quality is None else run.quality.factored.get("divergence")
    if measured is not None and run.predicted_divergence > 0:
        times = number(measured / run.predicted_divergence)
        words.append(f"Here the measured divergence is {times} times the predicted one.")
    return words


def check_text(plan: Plan) -> str:
    """How far the stored factors are from their prediction."""
    worst = largest_difference(plan)
    if worst is None:
        return "No weight has both a predicted loss and one measured from its factors."
    entry, difference = worst
    pairs = len(compared(plan))
    shown = [one for one in plan.entries if one.rank is not None and one.measured_loss is not None and one.total_loss]
    others = len(shown) - pairs
    return (
        f"The largest relative difference over {count(pairs)} weights is {number(difference, 2)}, at {entry.name}. "
        + (f"{count(others)} more lose nothing beyond rounding and are not shown. " if others else "")
        + "This checks the arithmetic: the stored factors lose what their spectrum said, in the metric of the "
        "calibration. It does not check the estimate itself; the measured divergence does."
        + (
            " What is measured of weights of integers has the loss of rounding in it; what is predicted has it only where "
            "bits were chosen together with ranks."
            if plan.integers
            else ""
        )
    )


def reasons(run: Run, plan: Plan, spectra: Spectra) -> list[str]:
    """What the allocation did, in a few sentences."""
    if plan.allocate == "uniform":
        words = ["The uniform allocation gives every weight the same share of its parameters; no loss was weighed."]
    else:
        additive = loss_of(plan).additive
        lost = "as little predicted loss" if additive else "as little of each weight's own Σσ²"
        words = [
            f"The {plan.allocate} allocation solves one problem over all weights: to leave out {lost} as the budget "
            "allows. In its solution one more stored parameter saves about as much in every weight. So a weight keeps much "
            "where its spectrum falls slowly" + (", or where the loss is sensitive to its output." if additive else ".")
        ]
        even = None if plan.integers else at_average(plan.entries, run, plan, spectra)
        if even is not None and run.predicted_divergence is not None:
            words.append(
                f"Had every weight kept the same {percent(share(plan.target_after, plan.target_before))}, the "
                f"predicted divergence would be {number(even)} nats per token; as allocated it is "
                f"{number(run.predicted_divergence)}."
            )
    layers = [group for group in by_layer(plan) if group.entries[0].layer is not None]
    least, most = min(layers, key=_keep, default=None), max(layers, key=_keep, default=None)
    if least is not None and most is not None and most.keep - least.keep > EVEN:
        words.append(
            f"By depth, layer {least.label} keeps least ({percent(least.keep)}) and layer {most.label} most "
            f"({percent(most.keep)})."
        )
    return words


def at_average(entries: list[PlanEntry], run: Run, plan: Plan, spectra: Spectra) -> float | None:
    """The loss of these weights if each kept the average share; None where losses have no common scale."""
    loss = loss_of(plan)
    if not (loss.known and loss.additive):
        return None
    lost = loss_at_share(entries, spectra, share(plan.target_after, plan.target_before), run.recipe.form == "plain")
    return None if lost is None else loss.factor * lost


def kind_reasons(run: Run, plan: Plan, spectra: Spectra) -> list[tuple[str, list[tuple[str, str]]]]:
    """The kinds that were cut most and least, each with what its spectra say; nothing if none was chosen over another."""
    kinds = sorted(by_kind(plan), key=_keep)
    if plan.allocate == "uniform" or len(kinds) < 2 or kinds[-1].keep - kinds[0].keep < EVEN:
        return []
    size = min(3, len(kinds) // 2)
    return [
        (title, [(group.label, _kind_reason(group, run, plan, spectra)) for group in groups])
        for title, groups in (("Cut most", kinds[:size]), ("Cut least", kinds[: -size - 1 : -1]))
    ]


def _keep(group: Group) -> float:
    return group.keep


def _kind_reason(group: Group, run: Run, plan: Plan, spectra: Spectra) -> str:
    """What one kind keeps and loses, and what that saves or costs against the average share."""
    loss = loss_of(plan)
    lost = sum(entry.predicted_loss or 0.0 for entry in plan.entries)
    words = f"keeps {percent(group.keep)}. It was {percent(share(group.before, plan.target_before))} of the parameters"
    if loss.known and loss.additive and lost:
        words += f" and carries {percent(group.lost / lost)} of the predicted loss"
    elif loss.known and not loss.additive and group.total:
        words += f" and leaves out {percent(group.shown(loss), 2)} of its Σσ²"
    words += "."
    needed = spread(group.entries, spectra)
    if needed is not None:
        words += f" On average 99\u00a0% of its Σσ² sits in the first {percent(needed, 0)} of its ranks."
    even = at_average(group.entries, run, plan, spectra)
    if even is None:
        return words
    average = share(plan.target_after, plan.target_before)
    more = group.after - average * group.before
    saved = even - group.shown(loss)
    return (
        f"{words} Against the average share of {percent(average)} this {'takes' if more >= 0 else 'frees'} "
        f"{millions(abs(more))} parameters and {'saves' if saved >= 0 else 'costs'} {number(abs(saved))} nats per "
        "token."
    )
