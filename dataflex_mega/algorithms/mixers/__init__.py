"""Mixers: one file each."""
