"""The layers that take the place of dense ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold.host.lazy import lazily

if TYPE_CHECKING:
    from twofold.nn.compact import Compact as Compact
    from twofold.nn.compact import CompactLinear as CompactLinear
    from twofold.nn.layers._basis import SharedBasis as SharedBasis
    from twofold.nn.layers.corrected import CorrectedLinear as CorrectedLinear
    from twofold.nn.layers.dense_columns import DenseColumnsLinear as DenseColumnsLinear
    from twofold.nn.layers.embedding import QuantizedEmbedding as QuantizedEmbedding
    from twofold.nn.layers.factored import FactoredLinear as FactoredLinear
    from twofold.nn.layers.quantized import QuantizedLinear as QuantizedLinear
    from twofold.nn.layers.shared import SharedLinear as SharedLinear
    from twofold.nn.layers.sliced import SlicedLinear as SlicedLinear
    from twofold.nn.layers.tied import TiedLinear as TiedLinear

__getattr__, __dir__ = lazily(__name__)
