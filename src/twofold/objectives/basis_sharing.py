"""One basis for the inputs of consecutive blocks, and coefficients for each: least error of the layers' outputs, as svd-llm.

The closed form is in twofold.structures. Source: Basis Sharing, Wang et al., ICLR 2025 (arXiv 2410.03765).
"""

from twofold.objectives.base import structural_objective

structural_objective(
    "basis-sharing",
    source="Basis Sharing, Wang et al., ICLR 2025 (arXiv 2410.03765)",
    needs={"whole_input"},
    loss="output",
    structures={"shared-basis"},
)
