"""The jobs: open, prepare, compress, factorize, search for a size, inspect, estimate."""
