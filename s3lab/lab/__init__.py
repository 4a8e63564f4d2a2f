"""What people look at: figures, their records, and the command line that makes them again."""
