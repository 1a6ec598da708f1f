"""How fast models and layers run on this machine."""
