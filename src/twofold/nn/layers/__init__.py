"""The storage layers, one file each: how a weight is stored, and what is computed with it."""
