"""A run's folder, read again: one page about it, several beside each other, and a list of all."""
