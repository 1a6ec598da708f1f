"""Spectra to a plan: the value, how it is made, and the evidence that is measured for it."""
