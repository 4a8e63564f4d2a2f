"""How a language model is built: its decoder layers, its linear layers, and which weights belong together."""
