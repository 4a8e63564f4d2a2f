"""Pruned models on disk: ordinary folders with their record, and packed ones that transformers loads."""
