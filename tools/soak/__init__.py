"""Trials of what happens to a training from outside, run by hand."""
