"""Selectors: one file each."""
