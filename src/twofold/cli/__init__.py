"""One command, one file a subcommand; nothing but arguments and printing."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from twofold.cli import (
    bench,
    chat,
    compare,
    compress,
    eval,
    export,
    extract,
    inspect,
    merge,
    plan,
    serve,
    status,
    tune,
)
from twofold.cli.settings import repeat_flags
from twofold.cli.words import one_line


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    """A command that ends with one sentence when it is stopped by Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            print("twofold: stopped; the same command goes on from what was done", file=sys.stderr)
            sys.exit(130)

    return run


app = typer.Typer(
    name="twofold",
    help="Factorize the weight matrices of Transformer models: smaller, faster, and explained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (
    compress, plan, inspect, eval, compare, bench, export, serve, chat, tune, merge, extract, status
):  # fmt: skip
    app.command(name=_module.__name__.rpartition(".")[2], no_args_is_help=True)(_stoppable(_module.command))


def _version(value: bool) -> None:
    if value:
        from twofold.version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main() -> None:
    """Run the command; 0 if it did what was asked, 2 if the user can put something right, 1 for a failure of ours."""
    from twofold.errors import TwofoldError

    try:
        app(repeat_flags(sys.argv[1:]))
    except TwofoldError as error:
        print(f"twofold: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
            print(
                "twofold: not enough memory; give less to the run with --memory, or use a smaller --batch-size or --window",
                file=sys.stderr,
            )
            sys.exit(2)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"twofold: no file can have the name {str(error.filename)[:80]!r}…: it is too long", file=sys.stderr)
            sys.exit(2)
        import traceback

        traceback.print_exc()
        print(
            f"twofold: this is a failure of ours ({type(error).__name__}: {error}); please report it", file=sys.stderr
        )
        sys.exit(1)
