"""Methods against each other: the same budget, several seeds, held-out perplexity, one report."""
