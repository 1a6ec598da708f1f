"""Texts as windows of tokens: to calibrate on, to measure on, and sampled from the model itself."""
