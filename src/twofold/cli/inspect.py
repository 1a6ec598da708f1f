"""twofold inspect: every weight of a model, which can be factorized, and why the others can't."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Json, Model, Trust
from twofold.cli.tables import answer, console, millions, plain, table

if TYPE_CHECKING:
    from twofold.run.inspect import Inspection


def command(
    model: Model,
    include: Annotated[list[str] | None, typer.Option(help="Patterns of layers to factorize.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns of layers to leave dense.")] = None,
    every: Annotated[bool, typer.Option("--all", help="A row for each weight, not for each kind.")] = False,
    trust_remote_code: Trust = False,
    json_output: Json = False,
) -> None:
    """List the weights of a model: shapes, groups that share an input, and what stays dense and why."""
    inspection = twofold.inspect(
        model, include=include or [], exclude=exclude or [], trust_remote_code=trust_remote_code
    )
    answer(inspection, json_output, lambda: print_inspection(inspection, every))


def print_inspection(inspection: Inspection, every: bool) -> None:
    """The weights of a model, by kind or one by one."""
    if every:
        table(
            inspection.model,
            ["weight", "shape", "parameters", "what", "shares its input with"],
            (
                [w.name, " × ".join(map(str, w.shape)), f"{w.numbers:,}", w.what, w.group or ""]
                for w in inspection.weights
            ),
        )
    else:
        kinds: dict[tuple[str, str, str], tuple[int, int]] = {}
        for w in inspection.weights:
            key = (w.kind, " × ".join(map(str, w.shape)), w.what)
            count, numbers = kinds.get(key, (0, 0))
            kinds[key] = (count + 1, numbers + w.numbers)
        table(
            inspection.model,
            ["kind", "shape", "what", "weights", "parameters"],
            (
                [kind, shape, what, str(count), millions(numbers)]
                for (kind, shape, what), (count, numbers) in kinds.items()
            ),
            left=3,
        )
        if inspection.shared:
            console.print("Weights that share an input: " + "; ".join(plain(s) for s in inspection.shared) + ".")
    share = inspection.target_numbers / inspection.total_numbers
    console.print(
        f"{inspection.architecture}: {millions(inspection.total_numbers)} parameters, of which "
        f"{millions(inspection.target_numbers)} ({share:.1%}) "
        f"{'are' if not inspection.factored else 'are or were'} in weights that can be factorized."
    )
