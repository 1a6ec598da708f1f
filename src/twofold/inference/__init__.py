"""The form that a factored model runs fastest in: ``optimize``."""
