"""What decides around the mask: which matrix gets which share of a budget.  One idea, one file."""
