"""Second moments and layer problems, in torch."""
