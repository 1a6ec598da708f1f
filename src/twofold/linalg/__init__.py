"""Matrices only: weighted low-rank approximation, spectra, and the gauge form. Knows no model."""

from twofold.linalg.gauge import GaugeForm, gauge_form, gauge_rank, gauge_storage, plain_storage
from twofold.linalg.metric import Metric, damp, is_full, metric_product, roots, working_dtype
from twofold.linalg.spectrum import (
    KnownRoots,
    Side,
    Spectrum,
    decompose,
    gram,
    smaller_side,
    truncate,
    truncation_loss,
    weighted_low_rank,
)

__all__ = [
    "GaugeForm",
    "KnownRoots",
    "Metric",
    "Side",
    "Spectrum",
    "damp",
    "decompose",
    "gauge_form",
    "gauge_rank",
    "gauge_storage",
    "gram",
    "is_full",
    "metric_product",
    "plain_storage",
    "roots",
    "smaller_side",
    "truncate",
    "truncation_loss",
    "weighted_low_rank",
    "working_dtype",
]
