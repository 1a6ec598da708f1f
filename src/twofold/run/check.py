"""What does not go together, refused before any work: what a method needs, and what the settings, the model or the way lack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from twofold.allocate import ALLOCATIONS, Allocating
from twofold.errors import TwofoldError
from twofold.objectives import OBJECTIVES
from twofold.recipe import Recipe
from twofold.refine import REFINEMENTS
from twofold.registry import Registry

NEEDS = {  # capability → what a method that needs it does
    "whole model": "works on a model that is whole in memory",
    "token logits": "is measured by what the model predicts",
    "next token": "measures how well the next token is predicted",
    "perplexity": "goes by the perplexity",
    "chain": "goes from block to block",
    "whole inputs": "looks at whole inputs",
    "two factors": "works on weights that are products of two of their own",
    "float factors": "works on factors of floating point",
    "float layers": "works on layers of floating point",
    "float numbers": "counts numbers of floating point",
    "nats": "compares losses in nats",
    "size": "measures the model at its size",
    "weights alone": "treats each weight alone",
    "measured times": "goes by measured times",
    "rounding": "measures what rounding loses",
}


Missing = Mapping[str, str]  # capability → why it is missing, as the end of a sentence


def refuse(recipe: Recipe, missing: Missing, remedy: str = "") -> None:
    """Refuse the first setting of a recipe that needs what is missing.

    Args:
        remedy: what else would help.

    Raises:
        TwofoldError: with what it needs, why that is missing, and what to do.
    """
    for setting, needs, alternative in _needs_of(recipe, missing):
        if unknown := needs - NEEDS.keys():
            raise TwofoldError(f"{setting} needs {min(unknown)!r}, which is none of {', '.join(NEEDS)}")
        for need in sorted(needs & missing.keys()):
            raise TwofoldError(f"{setting} {NEEDS[need]}, {missing[need]}; {alternative}{remedy}")


def missing_of(recipe: Recipe) -> dict[str, str]:
    """Return the capabilities that the settings of a recipe take away, whatever the model is."""
    objective = OBJECTIVES.get(recipe.objective)
    of = f"`objective={recipe.objective}`"
    missing: dict[str, str] = {}
    if objective.structures:
        missing |= {"two factors": f"and those of {of} are not", "weights alone": f"and {of} cuts weights together"}
    if "input" not in objective.needs:
        missing["whole inputs"] = f"and {of} does not"
    if objective.loss != "nats" or objective.build is None:
        missing["nats"] = f"which {of} does not give"
    if objective.full is None and objective.correct is None:
        missing["rounding"] = f"which is not known for {of}"
    if recipe.bits is not None:
        missing |= dict.fromkeys(
            ("float factors", "float numbers"), f"and `bits={recipe.bits}` rounds them to integers"
        )
    if setting := _rounding(recipe):
        rounds = f"`{setting}={getattr(recipe, setting)}`"
        missing["float layers"] = f"and {rounds} rounds some to integers"
        missing["measured times"] = f"and layers of {rounds} have none"
    if recipe.latency is not None:
        missing["float numbers"] = "which a budget in time does not count by"
    if recipe.goal is not None:
        missing["size"] = f"which {recipe.goal.setting} does not say"
    return missing


def _needs_of(recipe: Recipe, missing: Missing) -> Iterator[tuple[str, Set[str], str]]:
    """Yield the settings of a recipe, each with the capabilities that it needs, and what to do without it.

    Args:
        missing: the capabilities that are missing, so that a method which does without them can be named.
    """
    objective = OBJECTIVES.get(recipe.objective)
    for name in recipe.refine:
        without = "leave `refine` out" if recipe.effort is None else "give `refine=none`"
        others = _instead(REFINEMENTS, "refine", missing, without)
        yield (f"`refine={name}`", REFINEMENTS.get(name).needs, others)
    others = _instead(ALLOCATIONS, "allocate", missing, "leave `allocate` out", takes=candidates_of(recipe))
    yield (f"`allocate={recipe.allocate}`", ALLOCATIONS.get(recipe.allocate).needs, others)
    if setting := _rounding(recipe):
        needs = {"whole model", "weights alone"} | ({"rounding"} if recipe.bits == "auto" else set())
        yield (f"`{setting}={getattr(recipe, setting)}`", needs, f"leave `{setting}` out")
    if recipe.latency is not None:
        yield (f"`latency={recipe.latency:g}`", {"weights alone", "measured times"}, "give `keep` or `budget`")
    if objective.structures:
        others = _instead(OBJECTIVES, "objective", {"structures": ""}, "use another objective")
        yield (f"`objective={recipe.objective}`", {"whole model"}, others)
    if objective.needs and recipe.calibration == ["self"]:
        yield ("sampling texts to calibrate on", {"whole model"}, "name some with `calibration=FILE`")
    elif objective.needs and recipe.continuations:
        setting = f"`continuations={recipe.continuations}`"
        yield (setting, {"whole model"}, "leave `continuations` out")
    if (recipe.draws or 1) > 1:
        yield (f"`draws={recipe.draws}`", {"whole model"}, "leave `draws` out")
    if recipe.goal is not None:
        if recipe.goal.kind != "divergence":
            yield (recipe.goal.setting, {"perplexity"}, "give `kl_at_most`, `keep` or `budget`")
        yield (recipe.goal.setting, {"whole model", "token logits"}, "give `keep` or `budget`")


def _rounding(recipe: Recipe) -> str:
    """Return the setting that rounds weights to integers; empty if none does."""
    if recipe.bits is not None:
        return "bits"
    return "" if recipe.kept_bits is None else "dense_bits"


def _instead(methods: Registry[Any], setting: str, missing: Missing, otherwise: str, *, takes: str = "") -> str:
    """Name the methods that need nothing of what is missing, or say what to do where there is none."""
    # An objective with settings of its own is a whole published method: something to compare with, and no advice.
    able = [
        name
        for name in methods.names()
        if not _lacks(methods.get(name), missing)
        and not getattr(methods.get(name), "defaults", None)
        and (not takes or takes in methods.get(name).takes)
    ]
    return f"use {' or '.join(f'`{setting}={name}`' for name in able[:3])}" if able else otherwise


def _lacks(method: Any, missing: Missing) -> bool:
    """Say whether a method needs something that is missing."""
    if "structures" in missing:
        return bool(method.structures) or method.correct is not None
    return bool(method.needs & missing.keys())


def candidates_of(recipe: Recipe) -> str:
    """Return the kind of candidates that an allocation chooses among."""
    if recipe.bits == "auto":
        return "pairs"
    return "structures" if OBJECTIVES.get(recipe.objective).structures else "ranks"


def check_methods(recipe: Recipe) -> None:
    """Refuse unknown methods, and those that do not go with one another, whatever the model is.

    Raises:
        TwofoldError: naming the first of them.
    """
    missing = missing_of(recipe)
    objective, allocation = OBJECTIVES.get(recipe.objective), ALLOCATIONS.get(recipe.allocate)
    if objective.correct is not None:
        _check_correction(recipe)
    elif recipe.model_dump().get("rank") is not None:
        corrections = [name for name in OBJECTIVES.names() if OBJECTIVES.get(name).correct is not None]
        raise TwofoldError(
            f"`rank` is that of a correction ({', '.join(corrections)}); force one with `override=PATTERN=rank:64`"
        )
    refuse(recipe, missing)
    if objective.centred:
        _check_centred(recipe)
    kind = candidates_of(recipe)
    if kind not in allocation.takes:
        why = f"looks at the spectrum of each weight alone, and `objective={recipe.objective}` has none"
        if kind == "pairs":
            why = "chooses ranks alone, and `bits=auto` ranks and bits together"
        others = _instead(ALLOCATIONS, "allocate", missing, "leave `allocate` out", takes=kind)
        raise TwofoldError(f"`allocate={allocation.name}` {why}; {others}")
    if setting := _rounding(recipe):
        from twofold.quantize.rounding import need_torchao

        need_torchao(setting, str(getattr(recipe, setting)))


def _check_centred(recipe: Recipe) -> None:
    """Refuse settings that leave the means where they are, for an objective that is of centred inputs."""
    setting = "centre" if recipe.centre == "never" else _rounding(recipe)
    if setting:
        raise TwofoldError(
            f"`objective={recipe.objective}` puts the means of the inputs into the biases, which "
            f"`{setting}={getattr(recipe, setting)}` does not; leave `{setting}` out, or use another objective"
        )


def _check_correction(recipe: Recipe) -> None:
    """Refuse settings that a correction of integers does not go with."""
    of = f"`objective={recipe.objective}`"
    if recipe.fixed_bits is None:
        raise TwofoldError(f"{of} corrects weights of integers: give `bits`, as in `bits=4` (a comparison has none)")
    if recipe.overrides or recipe.allocate != Allocating.model_fields["allocate"].default:
        raise TwofoldError(
            f"{of} gives every weight the same rank; leave `allocate` and `override` out, and take weights out with `exclude`"
        )


def check_streamed(recipe: Recipe, resident: float, limit: float) -> None:
    """Refuse what needs the whole model in memory, where it is worked through block by block.

    Args:
        resident: the bytes that the whole model would take.
        limit: the bytes that may be used.

    Raises:
        TwofoldError: with what would let the model be whole in memory.
    """
    remedies = ["leave `stream` out"] if recipe.stream == "always" else []
    if resident > limit or not remedies:
        remedies.append(f"give it {resident / 1e9:.1f} GB with `memory`")
    missing = {"whole model": "and this one is worked through block by block"}
    refuse(recipe, missing, f", or {' and '.join(remedies)}")
