"""The grid of a comparison: objectives × allocations × keep ratios × refinements, on settings that all cells share."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from twofold.allocate import ALLOCATIONS
from twofold.objectives import OBJECTIVES
from twofold.planning.settings import SIZES
from twofold.recipe import Recipe, make_recipe
from twofold.refine import REFINEMENTS
from twofold.report.names import public_name
from twofold.settings.base import Settings, validated

# Settings of a recipe that a grid has in a way of its own, or not at all.
OWN = (*SIZES, "objective", "allocate", "refine", "effort", "eval_windows", "bits", "dense_bits", "group_size")
HELD_OUT_MEASURED = 4  # of the held-out windows of the calibration, at the most; refinement stops on the others
BASELINES = {"int8": 8, "int4": 4}  # quantizations of the dense model → bits
# Published methods that are an objective and a refinement after it, by name.
COMPOSED = {name: (objective, (step.name,)) for step in REFINEMENTS.all() for name, objective in step.published.items()}
STEPS = REFINEMENTS.names()


def _parts(value: object) -> list[Any]:
    """Split one value, or each of several, at commas."""
    values = value if isinstance(value, list | tuple) else [value]
    return [part for item in values for part in (item.split(",") if isinstance(item, str) else [item])]


def _several(value: object) -> object:
    """Return one value, or several between commas, as a list without repeats; ``none`` stands for nothing."""
    parts = [part.strip() if isinstance(part, str) else part for part in _parts(value)]
    return [part for i, part in enumerate(parts) if part not in ("", "none") and part not in parts[:i]]


Names = Annotated[list[str], BeforeValidator(_several)]


def _chains(value: object) -> object:
    """Return chains of refinements: between commas are several, + joins the steps of one, and ``none`` has no step."""
    chains = [part.split("+") if isinstance(part, str) else part for part in _parts(value)]
    if not all(isinstance(chain, list | tuple) and all(isinstance(name, str) for name in chain) for chain in chains):
        return chains  # pydantic says what is wrong with it
    steps = [tuple(name.strip() for name in chain if name.strip() not in ("", "none")) for chain in chains]
    return [list(chain) for chain in dict.fromkeys(steps)]


@dataclass(frozen=True)
class Cell:
    """One combination."""

    objective: str
    allocate: str
    keep: float
    refine: tuple[str, ...]

    @property
    def chain(self) -> str:
        return "+".join(self.refine) or "none"

    @property
    def words(self) -> str:
        refined = f", {self.chain}" if self.refine else ""
        return f"{self.objective}, {self.allocate}, keep {self.keep:g}{refined}"

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        return f"{self.objective}_{self.allocate}_{self.keep!r}_{self.chain}"


class Grid(Settings):
    """What is compared. The description of each field is also the help of its flag; ``settings`` are those of a recipe."""

    TITLE = "Grid"

    objectives: Annotated[
        Names,
        Field(
            min_length=1,
            description=f"objectives, with commas between: {', '.join([*OBJECTIVES.names(), *COMPOSED])}, or "
            f"{OBJECTIVES.others.partition(':')[0]}",
        ),
    ] = ["two-sided"]
    allocate: Annotated[
        Names, Field(min_length=1, description=f"allocations, with commas between: {', '.join(ALLOCATIONS.names())}")
    ] = ["global"]
    keep: Annotated[
        list[Annotated[float, Field(gt=0, le=1)]],
        BeforeValidator(_several),
        Field(min_length=1, description="shares of the factorized weights' parameters to keep, with commas between"),
    ]
    refine: Annotated[
        list[list[str]],
        BeforeValidator(_chains),
        Field(
            min_length=1,
            description="refinements, with commas between; + for one after another, none for no refinement: "
            f"none,{STEPS[0]},{'+'.join(STEPS[1:3])}",
        ),
    ] = [[]]
    baselines: Annotated[
        list[str] | None,
        BeforeValidator(lambda value: None if value is None else _several(value)),
        Field(
            description=f"quantizations of the dense model in the same table: {','.join(BASELINES)}, or none; by default both "
            "where torchao is installed"
        ),
    ] = None
    other_text: Annotated[
        Names, Field(description="text files to measure on, of another kind than the calibration")
    ] = []
    eval_windows: Annotated[int, Field(ge=0, description="windows of each text to measure on; 0 means all")] = 16
    settings: dict[str, Any] = {}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _apart(cls, given: Any) -> Any:
        """Put the settings of a recipe, which all cells share, together."""
        if not isinstance(given, dict):
            return given
        own = {**given}
        for size in SIZES:
            if size != "keep" and own.pop(size, None) is not None:
                raise ValueError(f"a comparison goes by keep ratios, not by {size}: name them with `keep=0.8,0.6`")
        objective = own.pop("objective", None)
        if objective is not None:
            own.setdefault("objectives", objective)
        if not isinstance(own.get("settings", {}), dict):
            raise ValueError("settings must be a mapping of settings that all cells share")
        shared = {name: own.pop(name) for name in list(own) if name in Recipe.model_fields and name not in OWN}
        return {**own, "settings": {**own.get("settings", {}), **shared}}

    @pydantic.model_validator(mode="after")
    def _check(self) -> Grid:
        self.keep = list(dict.fromkeys(self.keep))  # 0.8 and 0.80 are one
        for name in self.baselines or []:
            if name not in BASELINES:
                raise ValueError(f"there is no baseline {name!r}; choose one of {', '.join(BASELINES)}")
        self.recipe(next(self.cells()))  # what is wrong with a shared setting shows at once
        return self

    def cells(self) -> Iterator[Cell]:
        """Yield every combination, once; those of one objective follow one another."""
        methods = [COMPOSED.get(name, (name, ())) for name in self.objectives]
        yield from dict.fromkeys(
            Cell(objective, allocate, keep, (*first, *(step for step in chain if step not in first)))
            for objective in self.kernels
            for first in [first for kernel, first in methods if kernel == objective]
            for allocate in self.allocations(objective)
            for keep in self.keep
            for chain in self.refine
        )

    def allocations(self, objective: str) -> list[str]:
        """Return the allocations of an objective: its source's own, where none are named."""
        own = OBJECTIVES.get(objective).defaults.get("allocate")
        return self.allocate if own is None or "allocate" in self.model_fields_set else [own]

    @property
    def kernels(self) -> list[str]:
        """The objectives, with those of composed methods in their place."""
        return list(dict.fromkeys(COMPOSED.get(name, (name,))[0] for name in self.objectives))

    @property
    def chains(self) -> list[tuple[str, ...]]:
        """The refinements of all cells, each once."""
        return list(dict.fromkeys(cell.refine for cell in self.cells()))

    def recipe(self, cell: Cell) -> Recipe:
        """Return the recipe of one cell.

        Raises:
            TwofoldError: naming the setting that is wrong.
        """
        measured = min(self.eval_windows or HELD_OUT_MEASURED, HELD_OUT_MEASURED)
        return make_recipe({**self.settings, **vars(cell), "refine": list(cell.refine), "eval_windows": measured})

    def command(self) -> str:
        """Return the command that repeats the comparison, with no folder of this machine in it."""
        refine = ",".join("+".join(chain) or "none" for chain in self.refine)
        words = ["twofold", "compare", public_name(str(self.settings["model"]))]
        words += ["--objectives", ",".join(self.objectives)]
        if all(self.allocations(objective) == self.allocate for objective in self.kernels):
            words += ["--allocate", ",".join(self.allocate)]
        words += ["--keep", ",".join(f"{keep:g}" for keep in self.keep), "--refine", refine]
        if self.baselines is not None:
            words += ["--baselines", ",".join(self.baselines) or "none"]
        for name, value in self.settings.items():
            if name != "model" and value is not None and value is not False:
                words += _flags(name, value)
        for text in self.other_text:
            words += ["--other-text", public_name(text)]
        return shlex.join([*words, "--eval-windows", str(self.eval_windows), "--out", "arena"])


def _flags(name: str, value: Any) -> list[str]:
    """Return a setting as it is written on the command line, without the folders of this machine."""
    flag = "--override" if name == "overrides" else f"--{name.replace('_', '-')}"
    if value is True:
        return [flag]
    if isinstance(value, dict):
        values = [f"{pattern}={_override(override)}" for pattern, override in value.items()]
    else:
        public = public_name if name in ("calibration", "eval_text") else str
        values = [public(str(item)) for item in (value if isinstance(value, list) else [value])]
    return [word for item in values for word in (flag, item)]


def _override(override: Any) -> str:
    """Return an override as it is written in a flag."""
    settings = override if isinstance(override, dict) else override.model_dump(exclude_defaults=True)
    return next("dense" if key == "dense" else f"{key}:{value}" for key, value in settings.items() if value is not None)


def grid_fields() -> dict[str, FieldInfo]:
    """Return the fields of a grid, and those of a recipe that all of its cells share."""
    shared = {name: field for name, field in Recipe.model_fields.items() if name not in OWN}
    own = {name: field for name, field in Grid.model_fields.items() if name != "settings"}
    return {**own, **shared}


def make_grid(settings: dict[str, object]) -> Grid:
    """Check settings and return the grid.

    Raises:
        TwofoldError: naming the first setting that is wrong, what it must be, and what came.
    """
    return validated(Grid, settings, list(grid_fields()))
