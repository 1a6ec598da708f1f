"""How the refinements work; each is declared in the folder above."""
