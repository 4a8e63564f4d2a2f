"""Language models: the one that ships with the package, the text it reads, and the inputs of its layers."""
