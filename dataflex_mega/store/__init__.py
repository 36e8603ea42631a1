"""Values that are computed once and read many times, on disk: gradient features and reference losses."""
