"""Shared by tests: real text from the Python installation, a tiny model, and whole runs in one set of processes."""
