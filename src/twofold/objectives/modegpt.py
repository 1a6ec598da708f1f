"""Pairs of weights cut to smaller dense ones: hidden units, dimensions of values, dimensions of queries and keys.

The closed forms of the three kinds are in twofold.structures. The paper's shares of each layer, a softmax of their importance,
are left to the allocations. Source: MoDeGPT, Lin et al., ICLR 2025 (arXiv 2408.09632).
"""

from twofold.objectives import structural_objective

structural_objective(
    "modegpt",
    source="Lin et al., ICLR 2025 (arXiv 2408.09632)",
    needs={"whole_input", "input_mean"},
    loss="output",
    structures={"mlp", "value-output", "query-key"},
)
