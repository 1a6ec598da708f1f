"""The plan of the house, held by tests: each room imports rooms below it alone, and nothing grows too large."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import twofold

SOURCE = Path(twofold.__file__).parent
# Lowest first. A room is a folder of the package, or a file beside it; one that is not here is an error, on purpose.
ORDER = [
    "errors", "version", "registry", "host", "settings", "linalg", "objectives", "nn", "checkpoint", "model", "task", "calibrate",
    "adapters", "quantize", "structures", "inference", "decompose", "evidence", "allocate", "planning", "factor", "evaluation",
    "refine", "recipe", "report", "scratch", "run", "exports", "speed", "comparison", "tuning", "serving", "exploring",
    "vllm_plugin", "extend", "__init__", "cli", "__main__",
]  # fmt: skip
FILES = {"__init__.py", "__main__.py", "errors.py", "version.py", "registry.py"}
LINES, FUNCTION = 350, 70

PATHS = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(("twofold", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path) for path in PATHS}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the modules of ours that a file imports with their lines: at the top, in a function, or for types alone."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "twofold":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "twofold")


def test_no_room_imports_a_higher_one():
    climbs = []
    for path in PATHS:
        for line, module in imports(path):
            other = module.split(".")[1] if "." in module else "__init__"
            if path.name == "__init__.py" and path.parent == SOURCE:
                other = "errors"  # the face of the house shows every room
            if ORDER.index(other) > ORDER.index(room_of(path)):
                climbs.append(f"{path.relative_to(SOURCE)}:{line} imports {module}")
    assert not climbs, "\n".join(climbs)


def test_no_modules_import_each_other_in_a_circle():
    graph = {name_of(path): {module for _, module in imports(path)} for path in PATHS}
    graph["twofold"] = set()
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, " → ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_the_top_holds_rooms_and_five_files():
    assert {path.name for path in SOURCE.glob("*.py")} == FILES
    assert {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()} <= set(ORDER)


def test_files_and_functions_are_short():
    long = [
        str(path.relative_to(SOURCE)) for path in PATHS if len(path.read_text(encoding="utf-8").splitlines()) > LINES
    ]
    long += [
        f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in PATHS
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= FUNCTION
    ]
    assert not long, "\n".join(long)


def test_models_are_called_by_names_of_inputs_in_tasks_and_rooms_of_text_alone():
    """What is text by nature may call a model with token ids; everything else goes through the task."""
    text = {"task", "tuning", "serving", "speed", "exports", "vllm_plugin"}
    calls = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in PATHS
        if room_of(path) not in text
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call) and any(keyword.arg == "input_ids" for keyword in node.keywords)
    ]
    assert not calls
    asks = [str(p.relative_to(SOURCE)) for p in PATHS if "is_encoder_decoder" in p.read_text(encoding="utf-8")]
    assert asks == ["exports/decoding.py", "model/blocks.py"]  # the first is read where there is no twofold
