"""From a dense model to a pruned one: layer by layer, resumable, and within the memory of one layer."""
