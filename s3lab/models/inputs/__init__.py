"""N:M sparsity of what linear layers read, chosen token by token: the rule, and what it learns from a text."""
