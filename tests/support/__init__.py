"""Shared by tests: real text that every Python has, a tiny model, and whole runs inside one set of processes."""
