"""Reorders: patterns in which samples are ordered, one file each."""
