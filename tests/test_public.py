"""The public names: each command is one function of the same name, and nothing is loaded before it is used."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest

import twofold
import twofold.cli
from twofold.allocate import ALLOCATIONS
from twofold.comparison.grid import grid_fields
from twofold.objectives import OBJECTIVES
from twofold.recipe import Recipe
from twofold.refine import REFINEMENTS
from twofold.tuning.settings import TuneSettings

# Functions that work on models in memory, which no command can have.
IN_MEMORY = {"factorize", "find_targets", "load_model", "optimize", "training_optimizer"}
SETTINGS = {
    "compress": Recipe.model_fields,
    "plan": Recipe.model_fields,
    "compare": grid_fields(),
    "tune": TuneSettings.model_fields,
}
NAMED = {"report": "report_runs"}  # commands whose own name is that of a room
PRINTING = {"json_output", "every"}  # flags of a command that say what it prints
PARAMETERS = {"settings", "more", "recipe", "grid", "estimate"}  # of a function that stand for settings, or serve tests


def public_functions() -> set[str]:
    return {name for name in dir(twofold) if inspect.isfunction(getattr(twofold, name)) and not name.startswith("_")} - {
        "lazily", "on_import", "silence", "contextmanager", "import_module"
    }  # fmt: skip


def test_each_command_is_a_function_and_each_function_a_command():
    assert {NAMED.get(name, name) for name in twofold.cli.COMMANDS} == public_functions() - IN_MEMORY


@pytest.mark.parametrize("name", twofold.cli.COMMANDS)
def test_flags_are_the_parameters_of_the_function(name):
    command = import_module(f"twofold.cli.{name}").command
    flags = set(inspect.signature(command).parameters) - PRINTING - {"recipe"}
    function = set(inspect.signature(getattr(twofold, NAMED.get(name, name))).parameters) - PARAMETERS
    function |= set(SETTINGS.get(name, ())) | ({"model"} if name in SETTINGS else set())
    assert flags | {"quiet", "moments"} == function | {"quiet", "moments"}


def test_the_same_defaults_hold_in_both():
    for name in twofold.cli.COMMANDS:
        if name in SETTINGS:
            continue
        flags = inspect.signature(import_module(f"twofold.cli.{name}").command).parameters
        for parameter in inspect.signature(getattr(twofold, NAMED.get(name, name))).parameters.values():
            flag = flags.get(parameter.name)
            if flag is None or parameter.default is inspect.Parameter.empty:
                continue
            default = parameter.default
            plain = ",".join(map(str, default)) if isinstance(default, tuple) and default else default or None
            assert (flag.default or None) == plain, (name, parameter.name)


def test_names_that_there_are_not_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'twofold' has no attribute 'absent'"):
        twofold.absent  # noqa: B018
    assert {"compress", "Recipe", "FactoredLinear"} <= set(dir(twofold))


def loaded_by(code: str) -> dict[str, object]:
    """Run code in a fresh process; return what it printed, and which heavy packages are loaded behind it."""
    heavy = "[name for name in ('torch', 'transformers', 'numpy', 'peft', 'matplotlib') if name in sys.modules]"
    end = f"\nimport json, sys\nprint(json.dumps({{'heavy': {heavy}}}))"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code + end], capture_output=True, text=True, check=True
    )
    lines = done.stdout.strip().splitlines()
    return {**json.loads(lines[-1]), "out": "\n".join(lines[:-1]), "err": done.stderr}


def test_importing_loads_and_prints_nothing():
    assert loaded_by("import twofold") == {"heavy": [], "out": "", "err": ""}


def test_the_command_line_loads_nothing_heavy_before_it_works():
    code = """
import sys
from twofold.cli import main
for words in (["--version"], ["--help"], ["compress", "--help"], ["compare", "--help"], ["tune", "--help"],
              ["bench", "--help"], ["copress"], ["compress", "m", "--kep", "0.8"],
              ["compress", "./nowhere", "--keep", "0.8", "--out", "out"],
              ["plan", "./nowhere", "--keep", "2"], ["export", "./nowhere", "--to", "onnx", "--out", "out"],
              ["chat", "./nowhere"]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as error:
        print(words, error.code)
"""
    done = loaded_by(code)
    assert done["heavy"] == []
    assert done["out"].splitlines()[-1] == "['chat', './nowhere'] 2" and "Traceback" not in done["err"]
    assert done["err"].count("there is no folder ./nowhere") == 4


def test_settings_of_every_method_need_no_torch():
    """The recipe is composed of what the methods' files declare; their work is imported when it begins."""
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    code += "".join(
        f"import twofold.{kind}.{module}\n" for kind, registry in METHODS for module in registry._files.values()
    )
    code += "from twofold.recipe import make_recipe; make_recipe({'model': 'm', 'keep': 0.8})\n"
    code += "del sys.modules['torch'], sys.modules['transformers']"
    assert loaded_by(code)["heavy"] == []


METHODS = (("objectives", OBJECTIVES), ("allocate", ALLOCATIONS), ("refine", REFINEMENTS))


@pytest.mark.slow
def test_the_plug_in_is_registered_as_soon_as_a_model_can_be_loaded(checkpoint, text_file, tmp_path):
    twofold.factorize(
        str(checkpoint), keep=0.6, calibration=text_file, tokens=128, window=32, quiet=True
    ).save_pretrained(tmp_path / "small")
    first = "import twofold\nfrom transformers import AutoModelForCausalLM"
    last = "from transformers import AutoModelForCausalLM\nimport transformers.modeling_utils, twofold"
    for start in (first, last):
        code = f"{start}\nmodel = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'small')!r})\n"
        code += "print(type(model.model.layers[0].mlp.up_proj).__name__)"
        assert loaded_by(code)["out"].splitlines()[-1] == "FactoredLinear"
