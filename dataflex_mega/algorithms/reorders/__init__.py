"""Patterns by which samples are ordered, one file each."""
