"""Weighters: one file each."""
