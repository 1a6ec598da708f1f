"""twofold inspect: every weight of a model, which can be factorized, and why the others can't."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

import twofold
from twofold.cli.flags import Dequantize, Json, Model, Trust
from twofold.cli.tables import millions, plain, print_record, table, tally, tell

if TYPE_CHECKING:
    from twofold.run.inspect import Inspection


def command(
    model: Model,
    include: Annotated[list[str] | None, typer.Option(help="Patterns of layers to factorize.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns of layers to leave dense.")] = None,
    every: Annotated[bool, typer.Option("--all", help="A row for each weight, not for each kind.")] = False,
    trust_remote_code: Trust = False,
    dequantize: Dequantize = False,
    json_output: Json = False,
) -> None:
    """List the weights of a model: shapes, groups that share an input, and what stays dense and why."""
    inspection = twofold.inspect(
        model,
        include=include or [],
        exclude=exclude or [],
        trust_remote_code=trust_remote_code,
        dequantize=dequantize,
    )
    print_record(inspection, json_output, partial(print_inspection, every=every))


def print_inspection(inspection: Inspection, every: bool) -> None:
    """Print the weights of a model, by kind or one by one."""
    shapes = [" × ".join(map(str, w.shape)) for w in inspection.weights]
    weights = list(zip(inspection.weights, shapes, strict=True))
    if every:
        table(
            inspection.model,
            ["weight", "shape", "parameters", "what", "shares its input with"],
            ([w.name, shape, f"{w.numbers:,}", w.what, w.group or ""] for w, shape in weights),
        )
    else:
        kinds = tally(((w.kind, shape, w.what), w.numbers) for w, shape in weights)
        table(
            inspection.model,
            ["kind", "shape", "what", "weights", "parameters"],
            ([*kind, count, millions(numbers)] for kind, (count, numbers) in kinds.items()),
            left=3,
        )
        if inspection.shared:
            tell("Weights that share an input: " + "; ".join(map(plain, inspection.shared)) + ".")
    share = inspection.target_numbers / inspection.total_numbers
    tell(
        f"{inspection.architecture}: {millions(inspection.total_numbers)} parameters, of which "
        f"{millions(inspection.target_numbers)} ({share:.1%}) "
        f"{'are' if not inspection.factored else 'are or were'} in weights that can be factorized.",
    )
