"""Engines: what turns micro-batches into an optimizer step."""
