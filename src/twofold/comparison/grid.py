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
from twofold.settings.base import Settings, checked

OWN = (
    *SIZES,
    "objective",
    "allocate",
    "refine",
    "eval_windows",
    "bits",
    "dense_bits",
    "group_size",
)  # of the recipe, that a grid has in its own way
HELD_OUT_MEASURED = 4  # of the held-out windows of the calibration, at the most; refinement stops on the others
BASELINES = {"int8": 8, "int4": 4}  # quantizations of the dense model → bits
# Published methods that are an objective and a refinement after it, by name.
COMPOSED = {name: (objective, (one.name,)) for one in REFINEMENTS.all() for name, objective in one.published.items()}


def _several(value: object) -> object:
    """One value, or several between commas, as a list without repeats; ``none`` stands for nothing."""
    values = value if isinstance(value, list | tuple) else [value]
    parts = [part for one in values for part in (one.split(",") if isinstance(one, str) else [one])]
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    return list(dict.fromkeys(part for part in parts if part not in ("", "none")))


def _chains(value: object) -> object:
    """Chains of refinements: ``none,blockwise+distill`` is no refinement, and one after the other."""
    values = value if isinstance(value, list | tuple) else [value]
    parts = [part for one in values for part in (one.split(",") if isinstance(one, str) else [one])]
    chains = [part.split("+") if isinstance(part, str) else part for part in parts]
    found: dict[tuple[str, ...], None] = {}
    for chain in chains:
        if not isinstance(chain, list | tuple) or not all(isinstance(name, str) for name in chain):
            return chains  # pydantic says what is wrong with it
        found[tuple(name.strip() for name in chain if name.strip() not in ("", "none"))] = None
    return [list(chain) for chain in found]


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
        """As a file is called."""
        return f"{self.objective}_{self.allocate}_{self.keep!r}_{self.chain}"


class Grid(Settings):
    """What is compared. The description of each field is also the help of its flag; ``settings`` are those of a recipe."""

    TITLE = "Grid"

    objectives: Annotated[
        list[str],
        BeforeValidator(_several),
        Field(
            min_length=1,
            description=f"objectives, with commas between: {', '.join([*OBJECTIVES.names(), *COMPOSED])}, or two metrics as in "
            "whitened+rows",
        ),
    ] = ["two-sided"]
    allocate: Annotated[
        list[str],
        BeforeValidator(_several),
        Field(
            min_length=1,
            description=f"allocations, with commas between: {', '.join(ALLOCATIONS.names())}",
        ),
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
            "none,anchored,blockwise+distill",
        ),
    ] = [[]]
    baselines: Annotated[
        list[str] | None,
        BeforeValidator(lambda value: None if value is None else _several(value)),
        Field(
            description="quantizations of the dense model in the same table: int8,int4, or none; by default both where "
            "torchao is installed"
        ),
    ] = None
    other_text: Annotated[
        list[str],
        BeforeValidator(_several),
        Field(description="text files to measure on, of another kind than the calibration"),
    ] = []
    eval_windows: Annotated[int, Field(ge=0, description="windows of each text to measure on; 0 means all")] = 16
    settings: dict[str, Any] = {}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _apart(cls, given: Any) -> Any:
        """Settings of a recipe that all cells share are put together."""
        if not isinstance(given, dict):
            return given
        own = {**given}
        for other in SIZES:
            if other != "keep" and own.pop(other, None) is not None:
                raise ValueError(f"a comparison goes by keep ratios, not by {other}: name them with `keep=0.8,0.6`")
        single = own.pop("objective", None)
        if single is not None:
            own.setdefault("objectives", single)
        if not isinstance(own.get("settings", {}), dict):
            raise ValueError("settings must be a mapping of settings that all cells share")
        shared = {name: own.pop(name) for name in list(own) if name in Recipe.model_fields and name not in OWN}
        return {**own, "settings": {**own.get("settings", {}), **shared}}

    @pydantic.model_validator(mode="after")
    def _names(self) -> Grid:
        self.keep = list(dict.fromkeys(self.keep))  # 0.8 and 0.80 are one
        for name in self.baselines or []:
            if name not in BASELINES:
                raise ValueError(f"there is no baseline {name!r}; choose of {', '.join(BASELINES)}")
        self.recipe(next(self.cells()))  # what is wrong with a shared setting shows at once
        return self

    def cells(self) -> Iterator[Cell]:
        """Every combination, once; those of one objective follow one another."""
        yield from dict.fromkeys(
            Cell(objective, allocate, keep, (*first, *(step for step in chain if step not in first)))
            for objective in self.kernels
            for first in self._firsts(objective)
            for allocate in self.allocate
            for keep in self.keep
            for chain in self.refine
        )

    @property
    def kernels(self) -> list[str]:
        """The objectives, with those of composed methods in their place."""
        return list(dict.fromkeys(COMPOSED.get(name, (name,))[0] for name in self.objectives))

    @property
    def chains(self) -> list[tuple[str, ...]]:
        """The refinements of all cells, each once."""
        return list(dict.fromkeys(cell.refine for cell in self.cells()))

    def _firsts(self, objective: str) -> list[tuple[str, ...]]:
        """What the methods of one objective begin their refinement with."""
        methods = [COMPOSED.get(name, (name, ())) for name in self.objectives]
        return [first for kernel, first in methods if kernel == objective]

    def recipe(self, cell: Cell) -> Recipe:
        """The recipe of one cell.

        Raises:
            TwofoldError: naming the setting that is wrong.
        """
        own = {"objective": cell.objective, "allocate": cell.allocate, "keep": cell.keep, "refine": list(cell.refine)}
        measured = min(self.eval_windows or HELD_OUT_MEASURED, HELD_OUT_MEASURED)
        return make_recipe({**self.settings, **own, "eval_windows": measured})

    def command(self) -> str:
        """The command that repeats the comparison, with no folder of this machine in it."""
        from twofold.report.names import public_name

        words = ["twofold", "compare", public_name(str(self.settings["model"]))]
        words += ["--objectives", ",".join(self.objectives), "--allocate", ",".join(self.allocate)]
        words += ["--keep", ",".join(f"{keep:g}" for keep in self.keep)]
        words += ["--refine", ",".join("+".join(chain) or "none" for chain in self.refine)]
        if self.baselines is not None:
            words += ["--baselines", ",".join(self.baselines) or "none"]
        for name, value in self.settings.items():
            flag = "--override" if name == "overrides" else f"--{name.replace('_', '-')}"
            if name == "model" or value is None or value is False:
                continue
            if value is True:
                words.append(flag)
            elif isinstance(value, dict):
                for pattern, override in value.items():
                    words += [flag, f"{pattern}={_override(override)}"]
            else:
                for one in value if isinstance(value, list) else [value]:
                    words += [flag, public_name(str(one)) if name in ("calibration", "eval_text") else str(one)]
        for text in self.other_text:
            words += ["--other-text", public_name(text)]
        return shlex.join([*words, "--eval-windows", str(self.eval_windows), "--out", "arena"])


def _override(given: Any) -> str:
    """An override as it is written in a flag."""
    settings = given if isinstance(given, dict) else given.model_dump(exclude_defaults=True)
    return next(
        ("dense" if key == "dense" else f"{key}:{value}") for key, value in settings.items() if value is not None
    )


def grid_fields() -> dict[str, FieldInfo]:
    """The fields of a grid, and those of a recipe that all of its cells share."""
    shared = {name: field for name, field in Recipe.model_fields.items() if name not in OWN}
    own = {name: field for name, field in Grid.model_fields.items() if name != "settings"}
    return {**own, **shared}


def make_grid(settings: dict[str, object]) -> Grid:
    """Check settings and give the grid.

    Raises:
        TwofoldError: naming the first setting that is wrong, what it must be, and what came.
    """
    return checked(Grid, settings, list(grid_fields()))
