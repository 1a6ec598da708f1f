"""One command, one file a subcommand, each over the public function of the same name; nothing but arguments and printing."""

from __future__ import annotations

import ast
import errno
import functools
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from twofold.cli.words import one_line, repeat_flags, with_flags
from twofold.errors import TwofoldError
from twofold.host.progress import PHRASE
from twofold.model.place import find_model
from twofold.version import __version__

COMMANDS = (
    "compress", "plan", "inspect", "evaluate", "compare", "bench", "export", "serve", "chat", "tune", "merge", "extract",
    "status",
)  # fmt: skip
ALIASES = {"eval": "evaluate"}
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
        return command.name, _built(command.name), rest


def _docstring(name: str) -> str:
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command"]
    return ast.get_docstring(found[0]) or ""


def _built(name: str) -> Any:
    """Return the command of a name with its flags."""
    one = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    command = import_module(f"{__name__}.{name}").command
    one.command(name=name, no_args_is_help=True)(_guarded(command))
    return typer.main.get_command(one)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that finds its models before anything heavy is loaded, and ends with one sentence on Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            for parameter in MODELS:
                named = kwargs.get(parameter) or []
                for model in [named] if isinstance(named, str) else named:
                    find_model(model, kwargs.get("revision"))
            command(*args, **kwargs)
        except KeyboardInterrupt:
            print("twofold: stopped; the same command goes on from what was done", file=sys.stderr)
            sys.exit(130)

    return run


app = typer.Typer(
    name="twofold",
    cls=_Commands,
    help="Factorize the weight matrices of Transformer models: smaller, faster, and explained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main() -> None:
    """Run the command; 0 if it did what was asked, 2 if the user can put something right, 1 for a failure of ours."""
    PHRASE.set(with_flags)
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
