"""A model: where it is, how it is loaded, its blocks and its weights."""
