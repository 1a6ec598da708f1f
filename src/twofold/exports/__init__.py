"""Exports: a model in the form that other programs read, each compared with the model that it was made from."""
