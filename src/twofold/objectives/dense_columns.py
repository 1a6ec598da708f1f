"""Low rank in most inputs, dense in those that a low rank serves worst: least error of the layer's output, as svd-llm.

The closed form is in twofold.structures. Source: CPSVD, Xv et al., 2025 (arXiv 2510.19385).
"""

from twofold.objectives import structural_objective

structural_objective(
    "dense-columns",
    source="CPSVD, Xv et al. 2025 (arXiv 2510.19385)",
    needs={"whole_input"},
    loss="output",
    structures={"dense-columns"},
)
