"""Meshes, collectives and test processes: where torch.distributed is named outside the engines."""
