"""One basis for the inputs of consecutive blocks, and coefficients for each: least error of the layers' outputs, as svd-llm.

The closed form is in twofold.structures. Source: Basis Sharing, Wang et al., ICLR 2025 (arXiv 2410.03765).
"""

from typing import Annotated

from pydantic import Field

from twofold.objectives import structural_objective
from twofold.settings.base import Settings


class Sharing(Settings):
    """Which blocks share a basis."""

    TITLE = "Method"

    share_blocks: Annotated[int, Field(ge=1, description="blocks in a row whose weights of one kind share a basis")] = 2


structural_objective(
    "basis-sharing",
    source="Basis Sharing, Wang et al., ICLR 2025 (arXiv 2410.03765)",
    needs={"whole_input"},
    loss="output",
    structures={"shared-basis"},
    settings=Sharing,
    together=lambda settings: settings.part(Sharing).share_blocks,
)
