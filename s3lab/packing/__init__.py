"""Pruned weights as bytes: one codec for every pattern, its files, and linear layers that hold what is packed."""
