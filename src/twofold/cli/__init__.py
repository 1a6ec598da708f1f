"""One command, one file a subcommand, each over the public function of the same name; nothing but arguments and printing."""

from __future__ import annotations

import ast
import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from twofold.cli.streams import give_streams, until_cut_off
from twofold.cli.words import one_line, repeat_flags, with_flags
from twofold.errors import TwofoldError
from twofold.host.faults import is_out_of_memory
from twofold.host.progress import PHRASE
from twofold.model.place import find_model
from twofold.version import __version__

COMMANDS = (
    "compress", "plan", "inspect", "evaluate", "compare", "bench", "export", "explore", "serve", "chat", "tune", "merge",
    "extract", "report", "status",
)  # fmt: skip
ALIASES = {"eval": "evaluate"}
HELP = {"help_option_names": ["-h", "--help"]}
# What is wrong with a place, and not with a program; a file that is missing may be our fault.
PLACES = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
    errno.EMFILE, errno.ENFILE,
)  # fmt: skip
MODELS = ("model", "models", "against", "tuned", "base")  # parameters that name models


class _Commands(TyperGroup):
    """The commands. The list of them costs their docstrings; what a command needs is imported when it runs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]  # the names, for what is mistyped

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        name = ALIASES.get(cmd_name, cmd_name)
        return TyperCommand(name, help=_docstring(name)) if name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        command: Any
        _, command, rest = super().resolve_command(ctx, args)
        return command.name, _made(command.name), rest


@cache
def _made(name: str) -> Any:
    """Make a command of the function in its file; once in a process that runs several."""
    single = typer.Typer(add_completion=False, context_settings=HELP)
    single.command(name=name, no_args_is_help=True)(_guarded(import_module(f"{__name__}.{name}").command))
    return typer.main.get_command(single)


@cache
def _docstring(name: str) -> str:
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    command = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command")
    return ast.get_docstring(command) or ""


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that finds its models before anything heavy is loaded, and ends with one sentence on Ctrl-C."""

    @wraps(command)
    def run(**flags: Any) -> None:
        try:
            for parameter in MODELS:
                named = flags.get(parameter) or []
                for model in [named] if isinstance(named, str) else named:
                    find_model(model, flags.get("revision"))
            with until_cut_off(str(flags["out"]) if flags.get("out") else None):
                command(**flags)
        except KeyboardInterrupt:
            print("twofold: stopped; the same command goes on from what was done", file=sys.stderr)
            sys.exit(130)

    return run


app = typer.Typer(
    name="twofold",
    cls=_Commands,
    help="Factorize the weight matrices of Transformer models: smaller, faster, and explained.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


FIRST = """twofold factorizes the weights of Transformer models: smaller, faster, and explained. With the built-in model:

  twofold plan smollm2 --keep 0.8                           # which ranks, what size, how long it takes here
  twofold compress smollm2 --keep 0.8 --effort fast --out small    # do it: small/report.html tells what came out
  twofold chat small                                        # talk to the smaller model

For a model of your own, name its folder or its hub id, and texts of its kind: --calibration my-texts/*.txt
All commands: twofold --help. One command: twofold compress --help. The guides: docs/ beside the source, README.md first."""


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    if context.invoked_subcommand is None:
        print(FIRST)


def main() -> None:
    """Run the command; 0 if it did what was asked, 2 if the user can put something right, 1 for a failure of ours."""
    PHRASE.set(with_flags)
    give_streams()
    try:
        with until_cut_off():
            app(repeat_flags(sys.argv[1:]))
    except Exception as error:
        code, words = 2, _advice(error)
        if words is None:
            traceback.print_exc()
            code, words = 1, f"this is a failure of ours ({type(error).__name__}: {error}); please report it"
        with suppress(OSError):  # of a standard error that takes nothing
            print(f"twofold: {words}", file=sys.stderr)
        sys.exit(code)


def _that_names(place: object) -> str | None:
    """Return the variable of the environment by which a library looks for a place, in a folder that is not there."""
    places = [] if not isinstance(place, str) else [str(path) for path in (PurePath(place), *PurePath(place).parents)]
    named = ((name, value.rstrip("/")) for name, value in os.environ.items() if value.startswith("/"))
    return next((name for name, value in named if value in places and not Path(value).is_dir()), None)


def _advice(error: Exception) -> str | None:
    """Say what the user can put right; None if it is a failure of ours."""
    if isinstance(error, TwofoldError):
        return one_line(error)
    if is_out_of_memory(error):
        return "not enough memory; give less to the run with --memory, or use a smaller --batch-size or --window"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"no file can have the name {str(error.filename)[:80]!r}…: it is too long"
    if isinstance(error, FileNotFoundError) and (variable := _that_names(error.filename)) is not None:
        return (
            f"{error.filename} is not there, and {variable} names it; let that variable name a folder that can be made"
        )
    if isinstance(error, OSError) and (
        error.errno in PLACES or (error.filename is None and error.errno == errno.ENOENT)
    ):
        where = "the current folder, or one for temporary files," if error.filename is None else error.filename
        return one_line(OSError(f"{where} can't be used: {error.strerror or error}; name another place"))
    return None
