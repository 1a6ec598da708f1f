"""A plan to factored layers, in memory or block by block."""
