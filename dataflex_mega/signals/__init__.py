"""What is measured of candidates before a selection."""
