"""Twofold: the weight matrices of Transformer models, each as the product of two smaller ones.

Importing this package lets plain ``transformers`` load factored checkpoints.
"""

from twofold.checkpoint.plugin import TwofoldConfig
from twofold.comparison.arena import compare
from twofold.errors import TwofoldError
from twofold.inference.form import optimize
from twofold.model.load import load_model
from twofold.model.weights import find_targets
from twofold.nn.layers.dense_columns import DenseColumnsLinear
from twofold.nn.layers.factored import FactoredLinear
from twofold.nn.layers.shared import SharedLinear
from twofold.nn.layers.sliced import SlicedLinear
from twofold.planning.plan import Plan
from twofold.recipe import Recipe
from twofold.run.compress import compress
from twofold.run.factorize import factorize
from twofold.scratch.optimizer import training_optimizer
from twofold.version import __version__

__all__ = [
    "DenseColumnsLinear",
    "FactoredLinear",
    "Plan",
    "Recipe",
    "SharedLinear",
    "SlicedLinear",
    "TwofoldConfig",
    "TwofoldError",
    "__version__",
    "compare",
    "compress",
    "factorize",
    "find_targets",
    "load_model",
    "optimize",
    "training_optimizer",
]
