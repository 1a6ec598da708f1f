"""Twofold: the weight matrices of Transformer models, each as the product of two smaller ones.

Importing this package lets plain ``transformers`` load factored checkpoints, and loads nothing else before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from twofold.errors import TwofoldError as TwofoldError
from twofold.host.lazy import lazily
from twofold.host.on_import import on_import
from twofold.host.quiet import silence
from twofold.version import __version__ as __version__

if TYPE_CHECKING:
    from twofold.adapters.extract import extract as extract
    from twofold.adapters.merge import merge as merge
    from twofold.checkpoint.plugin import TwofoldConfig as TwofoldConfig
    from twofold.comparison.arena import compare as compare
    from twofold.evaluation.evaluate import evaluate as evaluate
    from twofold.exploring.server import explore as explore
    from twofold.exports.export import export as export
    from twofold.inference.form import optimize as optimize
    from twofold.model.load import load_model as load_model
    from twofold.model.weights import find_targets as find_targets
    from twofold.nn.layers.dense_columns import DenseColumnsLinear as DenseColumnsLinear
    from twofold.nn.layers.factored import FactoredLinear as FactoredLinear
    from twofold.nn.layers.shared import SharedLinear as SharedLinear
    from twofold.nn.layers.sliced import SlicedLinear as SlicedLinear
    from twofold.planning.plan import Plan as Plan
    from twofold.recipe import Recipe as Recipe
    from twofold.report.several import report_runs as report_runs
    from twofold.run.compress import compress as compress
    from twofold.run.factorize import factorize as factorize
    from twofold.run.inspect import inspect as inspect
    from twofold.run.plan import plan as plan
    from twofold.run.status import status as status
    from twofold.scratch.optimizer import training_optimizer as training_optimizer
    from twofold.serving.chat import chat as chat
    from twofold.serving.server import serve as serve
    from twofold.speed.bench import bench as bench
    from twofold.tuning.run import tune as tune

_load, __dir__ = lazily(__name__)
_NEEDS = {"tune": ("peft", "trl", "datasets"), "merge": ("peft",), "extract": ("peft",)}


def __getattr__(name: str) -> Any:
    if name in _NEEDS:
        from twofold.checkpoint.peft.register import need_packages

        need_packages(*_NEEDS[name])
    return _load(name)


@contextmanager
def _registered() -> Iterator[None]:
    yield
    import_module("twofold.checkpoint.plugin")


# The plug-in is of no use before a model can be loaded, and the table of quantizers, with torchao, takes seconds to load.
on_import("transformers.quantizers", silence)
on_import("transformers.modeling_utils", _registered)
