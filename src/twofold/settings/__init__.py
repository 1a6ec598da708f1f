"""How settings are read and checked: the recipe, sizes, goals."""
