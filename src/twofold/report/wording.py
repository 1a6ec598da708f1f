"""The page's sentences: what was done, how good the estimate is, and why some kinds keep more than others."""

from __future__ import annotations

from collections import Counter
from operator import attrgetter, itemgetter

from twofold.allocate import ALLOCATIONS
from twofold.objectives import OBJECTIVES
from twofold.planning.plan import Plan, PlanEntry
from twofold.recipe import Recipe
from twofold.report.formats import fraction
from twofold.report.kinds import Group, SpectraValues, by_kind, by_layer, energy_rank, loss_at_share, loss_of, made_of
from twofold.report.messages import Words
from twofold.report.names import model_title, without_paths
from twofold.report.record import Measured, Run
from twofold.report.scatter import compared

EVEN = 0.02  # kinds whose kept shares differ by less are called equal


def summary_text(run: Run | None, plan: Plan, words: Words) -> str:
    """Say what became of the model, or would become of it, in one paragraph."""
    factored, every = sum(entry.rank is not None for entry in plan.entries), len(plan.entries)
    name, planned = model_title(plan.model), "" if run is not None else ".plan"
    widths = Counter(e.bits for entries in (plan.entries, plan.dense) for e in entries if e.bits is not None)
    each = ", ".join(words.say("summary.bits", weights=words.count(widths[bits]), bits=bits) for bits in sorted(widths))
    integers = words.say("summary.integers", each=each) if each else ""
    if not factored:
        return words.say(f"summary.left{planned}", model=name, all=words.count(every), integers=integers)
    which = "summary.all" if factored == every else "summary.some"
    said = words.say(
        f"summary{planned}", model=name, which=words.say(which, some=words.count(factored), all=words.count(every)),
        form=made_of(plan, words), keep=words.percent(plan.keep), whole=words.percent(plan.keep_model),
        after=words.megabytes(plan.bytes_after), before=words.megabytes(plan.bytes_before), integers=integers,
    )  # fmt: skip
    if run is None:
        return said
    return said + (words.say("summary.unmeasured") if run.quality is None else _measured(run.quality, words))


def _measured(quality: Measured, words: Words) -> str:
    """Say what was measured of both models, in the order of what says most."""
    before, after = quality.original.get("perplexity"), quality.factored.get("perplexity")
    text = without_paths(quality.text)
    if before is not None:
        times = f" ({words.number(quality.ratio)}\u00a0×)" if quality.ratio is not None else ""
        both = {"before": words.number(before, 4), "after": words.number(after, 4)}
        return words.say("summary.perplexity", text=text, **both, times=times)
    scores = "".join(
        words.say(
            "summary.score", name=words.told(name.replace("_", " ")),
            before=words.number(old, 4), after=words.number(new, 4),
        )
        for name, (old, new) in quality.scores.items()
    )  # fmt: skip
    apart, unit = words.number(quality.factored.get("divergence")), words.nats(quality.prediction)
    return words.say("summary.scores", text=text, scores=scores, divergence=apart, unit=unit)


def quality_text(run: Run | None, words: Words) -> str:
    """Say on what text the quality was measured."""
    if run is None or run.quality is None:
        return words.say("quality.plan" if run is None else "quality.none")
    q = run.quality
    windows = words.say("quality.windows", windows=words.count(q.windows), window=words.count(q.window))
    return words.say(
        "quality.tokens" if q.prediction == "token" else "quality.samples",
        text=without_paths(q.text), size=q.size or windows, count=words.count(int(q.factored.get("tokens") or 0)),
        predictions=words.told(f"{q.prediction}s"),
    )  # fmt: skip


def estimate_text(run: Run | None, plan: Plan, words: Words) -> list[str]:
    """Say what the predicted divergence is, and how far it is from what was measured."""
    if plan.predicted_divergence is None:
        able = ", ".join(objective.name for objective in OBJECTIVES.all() if objective.loss == "nats")
        return [words.say("estimate.none", objectives=able)]
    said = [words.say("estimate")]
    measured = None if run is None or run.quality is None else run.quality.factored.get("divergence")
    if measured is not None and plan.predicted_divergence > 0:
        said.append(words.say("estimate.times", times=words.number(measured / plan.predicted_divergence)))
    return said


def check_text(plan: Plan, words: Words) -> str:
    """Say how far the stored factors are from their prediction."""
    pairs = compared(plan)
    if not pairs:
        return words.say("check.none")
    difference, entry = max(((abs(measured / lost - 1), e) for e, lost, measured in pairs), key=itemgetter(0))
    known = sum(e.rank is not None and e.measured_loss is not None and bool(e.total_loss) for e in plan.entries)
    exact = known - len(pairs)
    return words.say(
        "check.words", weights=words.count(len(pairs)), difference=words.number(difference, 2), name=entry.name,
        exact=words.say("check.exact", weights=words.count(exact)) if exact else "",
        integers=words.say("check.integers") if plan.integers else "",
    )  # fmt: skip


def reasons_text(recipe: Recipe, plan: Plan, spectra: SpectraValues, words: Words) -> list[str]:
    """Say what the allocation did, in a few sentences."""
    if ALLOCATIONS.get(plan.allocate).blind:
        said = [words.say("reasons.blind", allocate=plan.allocate)]
    else:
        key = "reasons.nats" if loss_of(plan).additive else "reasons.shares"
        said = [words.say(key, allocate=plan.allocate)]
        even = None if plan.integers else _at_average(plan.entries, recipe, plan, spectra)
        if even is not None and plan.predicted_divergence is not None:
            lost, unit = words.number(plan.predicted_divergence), words.nats(plan.prediction)
            keep = words.percent(plan.keep)
            said.append(words.say("reasons.even", keep=keep, even=words.number(even), unit=unit, lost=lost))
    layers = sorted((g for g in by_layer(plan) if g.entries[0].layer is not None), key=attrgetter("keep"))
    if layers and layers[-1].keep - layers[0].keep > EVEN:
        least, most = layers[0], max(layers, key=attrgetter("keep"))
        low, high = words.percent(least.keep), words.percent(most.keep)
        said.append(words.say("reasons.depth", least=least.label, low=low, most=most.label, high=high))
    return said


def _at_average(entries: list[PlanEntry], recipe: Recipe, plan: Plan, spectra: SpectraValues) -> float | None:
    """Return the loss of some weights if each kept the average share; None where losses have no common scale."""
    loss = loss_of(plan)
    if not (loss.known and loss.additive):
        return None
    lost = loss_at_share(entries, spectra, plan.keep, recipe.form == "plain")
    return None if lost is None else loss.factor * lost


def kind_reasons(
    recipe: Recipe, plan: Plan, spectra: SpectraValues, words: Words
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Say of the kinds that were cut most and least what their spectra tell; nothing if none was chosen over another."""
    kinds = sorted(by_kind(plan), key=attrgetter("keep"))
    if ALLOCATIONS.get(plan.allocate).blind or len(kinds) < 2 or kinds[-1].keep - kinds[0].keep < EVEN:
        return []
    size = min(3, len(kinds) // 2)
    return [
        (words.say(key), [(group.label, _kind_reason(group, recipe, plan, spectra, words)) for group in groups])
        for key, groups in (("reasons.cut.most", kinds[:size]), ("reasons.cut.least", kinds[: -size - 1 : -1]))
    ]


def _kind_reason(group: Group, recipe: Recipe, plan: Plan, spectra: SpectraValues, words: Words) -> str:
    """Say what one kind keeps and loses, and what that saves or costs against the average share."""
    loss = loss_of(plan)
    lost = sum(entry.predicted_loss or 0.0 for entry in plan.entries)
    key, share = "kind.keeps", None
    if loss.known and loss.additive and lost:
        key, share = "kind.carries", words.percent(group.lost / lost)
    elif loss.known and not loss.additive and group.total:
        key, share = "kind.leaves", words.percent(group.shown(loss), 2)
    part = words.percent(fraction(group.before, plan.target_before))
    said = words.say(key, keep=words.percent(group.keep), part=part, share=share)
    needed = energy_rank(group.entries, spectra)
    if needed is not None:
        said += words.say("kind.energy", share=words.percent(needed, 0))
    even = _at_average(group.entries, recipe, plan, spectra)
    if even is None:
        return said
    more, saved = group.after - plan.keep * group.before, even - group.shown(loss)
    moved = {"keep": words.percent(plan.keep), "numbers": words.millions(abs(more))}
    cost = {"nats": words.number(abs(saved)), "unit": words.nats(plan.prediction)}
    said += words.say("kind.takes" if more >= 0 else "kind.frees", **moved)
    return said + words.say("kind.saves" if saved >= 0 else "kind.costs", **cost)
