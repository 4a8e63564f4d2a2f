"""Patterns as integers: layouts, the specs made of them, and their text; no tensor library is imported."""
