"""Notebooks as runs: which, in which order, with which parameters, what is up to date, and what each made."""
