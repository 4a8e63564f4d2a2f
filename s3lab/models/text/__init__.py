"""What a model begins with: the built-in text and others, the reference model, and models by name, file or folder."""
