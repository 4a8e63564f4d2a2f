"""Widgets to look and try with in JupyterLab: patterns, the pruning of one layer, the runs of whole models."""

from s3lab.lab.explore.patterns import explore_patterns as explore_patterns
from s3lab.lab.explore.pruning import explore_pruning as explore_pruning
from s3lab.lab.explore.runs import explore_runs as explore_runs
