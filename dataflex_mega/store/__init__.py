"""What is computed once and read many times, on disk."""
