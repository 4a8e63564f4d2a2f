"""What was lost in pruning, trained back: the weights that are kept, on text or from the dense model."""
