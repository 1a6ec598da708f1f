"""The layers that take the place of dense ones."""

from twofold.nn.bits import default_group
from twofold.nn.compact_linear import CompactLinear
from twofold.nn.dense_columns_linear import DenseColumnsLinear
from twofold.nn.factored_linear import FactoredLinear
from twofold.nn.int_matrix import IntLinear, IntMatrix, int_bytes
from twofold.nn.quantized_embedding import QuantizedEmbedding, TiedLinear
from twofold.nn.quantized_linear import CorrectedLinear, QuantizedLinear
from twofold.nn.shared_linear import SharedBasis, SharedLinear
from twofold.nn.sliced_linear import SlicedLinear

__all__ = [
    "CompactLinear",
    "CorrectedLinear",
    "DenseColumnsLinear",
    "FactoredLinear",
    "IntLinear",
    "IntMatrix",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "SharedBasis",
    "SharedLinear",
    "SlicedLinear",
    "TiedLinear",
    "default_group",
    "int_bytes",
]
