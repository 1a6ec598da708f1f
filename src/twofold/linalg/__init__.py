"""Matrices only: weighted low-rank approximation, spectra, and the gauge form. Knows no model.

The names that a method is written with are loaded when they are first asked for, so that a file that only declares a method needs
no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold.host.lazy import lazily

if TYPE_CHECKING:
    from twofold.linalg.metric import damp as damp
    from twofold.linalg.spectrum import eigen_low_rank as eigen_low_rank
    from twofold.linalg.spectrum import gram as gram
    from twofold.linalg.spectrum import smaller_side as smaller_side
    from twofold.linalg.spectrum import weighted_low_rank as weighted_low_rank

__getattr__, __dir__ = lazily(__name__)
