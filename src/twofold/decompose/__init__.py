"""Moments to spectra."""
