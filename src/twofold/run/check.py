"""What does not go together, refused before any work: what a method needs, and what the settings, the model or the way lack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from twofold.allocate import ALLOCATIONS, Allocating, Allocation
from twofold.errors import TwofoldError
from twofold.objectives import OBJECTIVES
from twofold.recipe import Recipe
from twofold.refine import REFINEMENTS
from twofold.registry import Registry

NEEDS = {  # capability → what a method that needs it does
    "whole model": "works on a model that is whole in memory",
    "token logits": "is measured by what the model predicts",
    "next token": "measures how well the next token is predicted",
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


@dataclass(frozen=True)
class User:
    """A setting that needs something.

    Args:
        instead: what to do without it.
    """

    who: str
    needs: frozenset[str]
    instead: str


Missing = Mapping[str, str]  # capability → why it is not there, as the end of a sentence


def refuse(users: Iterable[User], missing: Missing, remedy: str = "") -> None:
    """Refuse the first setting that needs what is not there.

    Args:
        remedy: what else would help.

    Raises:
        TwofoldError: with what it needs, why that is not there, and what to do.
    """
    for user in users:
        for need in sorted(user.needs & missing.keys()):
            raise TwofoldError(f"{user.who} {NEEDS[need]}, {missing[need]}; {user.instead}{remedy}")


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
    if recipe.bits is not None or recipe.kept_bits is not None:
        rounds = f"`bits={recipe.bits}`" if recipe.bits is not None else f"`dense_bits={recipe.dense_bits}`"
        missing["float layers"] = f"and {rounds} rounds some to integers"
        missing["measured times"] = f"and layers of {rounds} have none"
    if recipe.latency is not None:
        missing["float numbers"] = "which a budget in time does not count by"
    if recipe.goal is not None:
        missing["size"] = f"which {recipe.goal.setting} does not say"
    return missing


def users_of(recipe: Recipe, missing: Missing) -> Iterator[User]:
    """Yield the settings of a recipe that need something.

    Args:
        missing: what is not there, so that what would do instead can be named.
    """
    objective = OBJECTIVES.get(recipe.objective)
    for name in recipe.refine:
        yield User(
            f"`refine={name}`",
            REFINEMENTS.get(name).needs,
            instead(REFINEMENTS, "refine", missing, "leave `refine` out"),
        )
    allocation = ALLOCATIONS.get(recipe.allocate)
    others = instead(ALLOCATIONS, "allocate", missing, "leave `allocate` out", takes=candidates_of(recipe))
    yield User(f"`allocate={recipe.allocate}`", allocation.needs, others)
    if recipe.bits is not None or recipe.kept_bits is not None:
        setting = "bits" if recipe.bits is not None else "dense_bits"
        value = recipe.bits or recipe.dense_bits
        needs = {"whole model", "weights alone"} | ({"rounding"} if recipe.bits == "auto" else set())
        yield User(f"`{setting}={value}`", frozenset(needs), f"leave `{setting}` out")
    if recipe.latency is not None:
        needs = {"weights alone", "measured times"}
        yield User(f"`latency={recipe.latency:g}`", frozenset(needs), "give `keep` or `budget`")
    if objective.structures:
        others = instead(OBJECTIVES, "objective", {"structures": ""}, "use another objective")
        yield User(f"`objective={recipe.objective}`", frozenset({"whole model"}), others)
    if objective.needs and (recipe.calibration == ["self"] or recipe.continuations):
        texts = recipe.calibration == ["self"]
        who = "sampling texts to calibrate on" if texts else f"`continuations={recipe.continuations}`"
        do = "name some with `calibration=FILE`" if texts else "leave `continuations` out"
        yield User(who, frozenset({"whole model"}), do)
    if recipe.goal is not None:
        yield User(recipe.goal.setting, frozenset({"whole model", "token logits"}), "give `keep` or `budget`")


def instead(methods: Registry[Any], setting: str, missing: Missing, otherwise: str, *, takes: str = "") -> str:
    """Name the methods that need nothing of what is missing, or say what to do where there is none."""
    able = [
        name
        for name in methods.names()
        if not _lacks(methods.get(name), missing) and (not takes or takes in methods.get(name).takes)
    ]
    return f"use {' or '.join(f'`{setting}={name}`' for name in able[:3])}" if able else otherwise


def _lacks(method: Any, missing: Missing) -> bool:
    if "structures" in missing:
        return bool(method.structures) or method.correct is not None
    return bool(method.needs & missing.keys())


def candidates_of(recipe: Recipe) -> str:
    """Return the kind of candidates that ranks are chosen of."""
    if recipe.bits == "auto":
        return "pairs"
    return "structures" if OBJECTIVES.get(recipe.objective).structures else "ranks"


def check_methods(recipe: Recipe) -> None:
    """Refuse methods that there are not, or that do not go with one another, whatever the model is.

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
    refuse(users_of(recipe, missing), missing)
    kind = candidates_of(recipe)
    if kind not in allocation.takes:
        raise TwofoldError(_not_taken(recipe, allocation, kind))
    if recipe.bits is not None or recipe.kept_bits is not None:
        from twofold.quantize.rounding import need_torchao

        setting = "bits" if recipe.bits is not None else "dense_bits"
        need_torchao(setting, str(getattr(recipe, setting)))


def _not_taken(recipe: Recipe, allocation: Allocation, kind: str) -> str:
    able = instead(ALLOCATIONS, "allocate", missing_of(recipe), "leave `allocate` out", takes=kind)
    if kind == "pairs":
        return f"`allocate={allocation.name}` chooses ranks alone, and `bits=auto` ranks and bits together; {able}"
    return (
        f"`allocate={allocation.name}` looks at the spectrum of each weight alone, and `objective={recipe.objective}` has none; "
        f"{able}"
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


def check_streamed(recipe: Recipe, resident: float) -> None:
    """Refuse what needs the whole model in memory, where it is worked through block by block.

    Args:
        resident: the bytes that the whole model would take.

    Raises:
        TwofoldError: with the memory that it would take.
    """
    missing = {"whole model": "and this one is worked through block by block"}
    refuse(users_of(recipe, missing), missing, f", or give it {resident / 1e9:.1f} GB with `memory`")


def check_model(recipe: Recipe, lacks: Missing) -> None:
    """Refuse what needs more than a model gives.

    Args:
        lacks: what the model does not give, and why.

    Raises:
        TwofoldError: naming the first setting.
    """
    refuse(users_of(recipe, lacks), lacks)
