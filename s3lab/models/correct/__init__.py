"""What changes the weights around a mask: scales moved between layers, and the rest trained again."""
