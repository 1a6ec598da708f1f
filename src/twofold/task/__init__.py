"""What a model is for: samples, outputs, labels."""
