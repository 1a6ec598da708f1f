"""The arena: many factorizations of one model, on one calibration, measured side by side with the dense model."""
