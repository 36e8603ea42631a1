"""Process groups, collectives and processes for tests: where torch.distributed is named outside the engines."""
