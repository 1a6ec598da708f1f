"""A quantized matrix with a correction of low rank, W ≈ Q + A B: the settings that all corrections have.

    lqer         SVD of E S, E = W − Q, S the mean magnitudes of the inputs
    qera-exact   min ‖(E − A B) C^½‖_F with C = E[x xᵀ]
    eora         SVD of E Q Λ^½ with C = Q Λ Qᵀ, taken back by the inverse

The last two minimize the same error of the outputs, and their products agree; they take another root of C.
"""

from typing import Annotated

from pydantic import Field

from twofold.settings.base import Settings


class Correction(Settings):
    """How large a correction is."""

    TITLE = "Method"

    rank: Annotated[int | None, Field(ge=1, description="rank of every correction, 32 if it is not given")] = None
