"""The sample pool, the order of samples, and batches."""
