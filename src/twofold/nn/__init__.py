"""The layers that take the place of dense ones."""

from twofold.nn.compact_linear import CompactLinear
from twofold.nn.dense_columns_linear import DenseColumnsLinear
from twofold.nn.factored_linear import FactoredLinear
from twofold.nn.shared_linear import SharedBasis, SharedLinear
from twofold.nn.sliced_linear import SlicedLinear

__all__ = ["CompactLinear", "DenseColumnsLinear", "FactoredLinear", "SharedBasis", "SharedLinear", "SlicedLinear"]
