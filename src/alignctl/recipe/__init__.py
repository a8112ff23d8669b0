"""Recipes: what they may say (schema), how they are read (load), and the ones that ship (catalog)."""
