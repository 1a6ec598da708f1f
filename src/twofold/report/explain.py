"""A plan in words: why one weight keeps more than another, what a megabyte more would buy, and whether integers serve better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from twofold.allocate import Candidate, Choice
from twofold.allocate.global_ import spend
from twofold.planning.make import Problem
from twofold.planning.menu import PlanRequest
from twofold.planning.plan import Plan, PlanEntry
from twofold.planning.settings import Planning
from twofold.planning.storage import Storage
from twofold.report.kinds import loss_of
from twofold.report.messages import Words

MEGABYTE = 1e6
NAMED = 3  # weights that a further megabyte goes to
PART = 0.9  # of what could be lost, whose directions are counted
MOVED = 0.1  # of what the weight that keeps most keeps


def explain(
    recipe: Planning, request: PlanRequest | None, plan: Plan, rounded: Mapping[int, float], words: Words
) -> list[str]:
    """Return an explanation, sentence by sentence; settings stand between backticks.

    Args:
        request: what was planned; None if no weight was read.
        rounded: what all targets lose whole in integers, Σσ² by bits, as far as it is known.
    """
    if request is None or request.spectra is None:
        reasons = [words.say("why.shapes")]
    elif recipe.corrects or not plan.entries:
        reasons = [words.say("why.same")]
    else:
        reasons = _Reasons.of(request, plan, words).sentences()
    return reasons + _integers(recipe, plan, rounded, words)


@dataclass(frozen=True)
class _Weight:
    """One candidate with what the plan has chosen of it."""

    candidate: Candidate
    entries: list[PlanEntry]
    choice: Choice
    forced: bool

    @property
    def name(self) -> str:
        return ", ".join(entry.name for entry in self.entries)

    @property
    def share(self) -> float:
        """The share of its numbers that it keeps."""
        return sum(e.numbers_after for e in self.entries) / sum(e.numbers_before for e in self.entries)

    def at(self, cost: float) -> Choice:
        """Return the most that a cost allows."""
        dense = self.candidate.dense_cost
        if dense is not None and dense <= cost:
            return Choice(None)
        return Choice(max(int(np.searchsorted(self.candidate.costs, cost * (1 + 1e-12), side="right")) - 1, 0))

    def lost(self, choice: Choice) -> float:
        return choice.loss(self.candidate)


@dataclass(frozen=True)
class _Reasons:
    """The reasons of a plan that was chosen by losses."""

    request: PlanRequest
    problem: Problem
    plan: Plan
    weights: list[_Weight]
    words: Words

    @classmethod
    def of(cls, request: PlanRequest, plan: Plan, words: Words) -> _Reasons:
        problem, by_name = Problem.of(request), {entry.name: entry for entry in plan.entries}
        weights = []
        for candidate in problem.candidates:
            first = problem.menu.entries(candidate, Choice(0 if len(candidate.ranks) else None))
            entries = [by_name[entry.name] for entry in first]
            choice = _chosen(request, plan, candidate, entries)
            weights.append(_Weight(candidate, entries, choice, candidate.name in problem.menu.forced))
        return cls(request, problem, plan, weights, words)

    @property
    def timed(self) -> bool:
        return self.request.recipe.latency is not None

    @property
    def comparable(self) -> bool:
        """Whether the losses of two weights may be added up."""
        return loss_of(self.plan).additive or self.request.relative

    def sentences(self) -> list[str]:
        allocate, words = self.plan.allocate, self.words
        said = [words.say("why.rule") if allocate == "global" else words.say("why.other", allocate=allocate)]
        free = [weight for weight in self.weights if weight.entries[0].rank is not None and not weight.forced]
        if free:
            most, least = max(free, key=lambda w: w.share), min(free, key=lambda w: w.share)
            if most.share == least.share:
                said.append(words.say("why.same"))
            else:
                said += [
                    *self._extreme("why.most", most),
                    *self._extreme("why.least", least),
                    *self._moved(most, least),
                ]
        whole = [weight for weight in self.weights if weight.choice.index is None and not weight.forced]
        if len(whole) == len(self.weights):
            said.append(words.say("why.dense.all"))
        elif len(whole) == 1:
            said.append(words.say("why.dense.one", name=whole[0].name))
        elif whole:
            said.append(words.say("why.dense", count=words.count(len(whole))))
        return [*said, self._next()]

    def _extreme(self, key: str, weight: _Weight) -> list[str]:
        """Say what a weight keeps, how its spectrum falls, and what it loses."""
        words, loss, entry = self.words, loss_of(self.plan), weight.entries[0]
        shape = f"{entry.out_features} × {entry.in_features}"
        full = max(min(entry.out_features, entry.in_features), int(weight.candidate.ranks[-1]))  # kept rows can be more
        said = [
            words.say(key, name=weight.name, shape=shape, rank=entry.rank, full=full, share=words.percent(weight.share))
        ]
        values = (self.request.spectra or {}).get(entry.name) if len(weight.entries) == 1 else None
        if values is not None and float(np.sum(values)) > 0:
            held = np.cumsum(np.asarray(values, dtype=np.float64))
            said.append(words.say("why.flat", rank=int(np.searchsorted(held, PART * held[-1])) + 1, full=full))
        total = sum(each.total_loss or 0.0 for each in weight.entries)
        lost = sum(each.predicted_loss or 0.0 for each in weight.entries)
        if loss.additive:
            amounts = {"total": words.number(loss.factor * total), "lost": words.number(loss.factor * lost)}
            said.append(words.say("why.total", unit=words.nats(self.plan.prediction), **amounts))
        elif total:
            said.append(words.say("why.left", percent=words.percent(lost / total)))
        return said

    def _moved(self, most: _Weight, least: _Weight) -> list[str]:
        """Say what a tenth of one weight would do in another."""
        if self.timed or not self.comparable:
            return []
        cost, other = most.choice.cost(most.candidate), least.choice.cost(least.candidate)
        part = MOVED * cost
        before = most.lost(most.choice) + least.lost(least.choice)
        after = most.lost(most.at(cost - part)) + least.lost(least.at(other + part))
        if before <= 0:
            return []
        key = "why.moved" if after >= before else "why.moved.less"
        return [self.words.say(key, most=most.name, least=least.name, times=self.words.number(after / before))]

    def _next(self) -> str:
        """Say what one megabyte more would buy."""
        words, loss, element = self.words, loss_of(self.plan), self.plan.element_bytes
        if self.timed:
            return words.say("why.next.time")
        free = [weight for weight in self.weights if not weight.forced]
        room = MEGABYTE if self.request.recipe.in_bytes else MEGABYTE / element
        choices = spend([w.candidate for w in free], [w.choice for w in free], room)
        gains = sorted(
            ((w.lost(w.choice) - w.lost(now), w, now) for w, now in zip(free, choices, strict=True) if now != w.choice),
            key=lambda gain: -gain[0],
        )
        saved, before = sum(gain for gain, _, _ in gains), sum(w.lost(w.choice) for w in self.weights)
        if saved <= 0 or before <= 0:
            return words.say("why.next.none")
        steps = ", ".join(self._step(weight, now) for _, weight, now in gains[:NAMED])
        told = {"percent": words.percent(saved / before), "count": words.count(len(gains)), "steps": steps}
        if not loss.additive:
            return words.say("why.next.share", **told)
        both = {
            "before": words.number(loss.factor * before),
            "after": words.number(loss.factor * max(before - saved, 0.0)),
        }
        return words.say("why.next", unit=words.nats(self.plan.prediction), **told, **both)

    def _step(self, weight: _Weight, now: Choice) -> str:
        """Say from what to what a weight would go."""
        after = self.problem.menu.entries(weight.candidate, now)[0]
        return self.words.say(
            "why.step", name=weight.name, before=self._kept(weight.entries[0]), after=self._kept(after)
        )

    def _kept(self, entry: PlanEntry) -> str:
        words = self.words
        if entry.rank is None:
            return words.say("why.whole") if entry.bits is None else words.say("why.bits", bits=entry.bits)
        key = "why.rank" if entry.bits is None or self.request.recipe.fixed_bits else "why.rank.bits"
        return words.say(key, rank=entry.rank, bits=entry.bits)


def _chosen(request: PlanRequest, plan: Plan, candidate: Candidate, entries: list[PlanEntry]) -> Choice:
    """Return the choice that a candidate's entries stand for: by rank where each has its own, else by what is stored."""
    if not any(entry.replaced and (entry.rank is not None or request.recipe.bits == "auto") for entry in entries):
        return Choice(None)
    if request.recipe.bits != "auto" and not request.targets.structures:
        return Choice(int(np.searchsorted(candidate.ranks, entries[0].rank or 0)))
    stored = sum(plan.stored_bytes(e) if request.recipe.in_bytes else e.numbers_after for e in entries)
    return Choice(int(np.abs(candidate.costs - stored).argmin()))


def _integers(recipe: Planning, plan: Plan, rounded: Mapping[int, float], words: Words) -> list[str]:
    """Say whether whole weights in integers would serve better at the same bytes."""
    now = plan.bytes_after - plan.dense_bytes
    sizes = {bits: _whole(recipe, plan, bits) for bits in (8, 4)}
    size_words = {"now": words.megabytes(now), "eight": words.megabytes(sizes[8]), "four": words.megabytes(sizes[4])}
    said = [words.say("why.sizes", **size_words)]
    lost = plan.predicted_divergence
    if lost is None or not rounded:
        said.append(words.say("why.unknown"))
        key = "why.better.rule" if sizes[8] <= now else "why.between" if sizes[4] <= now else "why.smaller"
        return [*said, words.say(key), words.say("why.both")]
    factor = loss_of(plan).factor
    losses = {bits: factor * rounded[bits] for bits in sizes}
    loss_words = {"now": words.number(lost), "eight": words.number(losses[8]), "four": words.number(losses[4])}
    said.append(words.say("why.lost", unit=words.nats(plan.prediction), **loss_words))
    better = [bits for bits in sizes if sizes[bits] <= now and losses[bits] < lost]
    if better:
        best = min(better, key=lambda bits: losses[bits])
        said.append(words.say("why.better", bits=best))
    elif sizes[8] <= now:
        said.append(words.say("why.trade", lost=loss_words["eight"], size=size_words["eight"]))
    else:
        said.append(words.say("why.worse" if sizes[4] <= now else "why.smaller"))
    return [*said, words.say("why.both")]


def _whole(recipe: Planning, plan: Plan, bits: int) -> int:
    """Return the bytes of all targets, whole in integers."""
    storage = Storage(recipe, plan.element_bytes, bits)
    return sum(storage.bytes(entry, None) for entry in plan.entries)
