"""Rows of a pool without a tokenizer."""

import numpy as np


class EqualTokens:
    """Rows of three equal tokens, `first` in the first row, one more in each that follows."""

    def __init__(self, count, first):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def fetch(self, rows):
        return [(np.full(3, self.first + r), np.full(3, self.first + r)) for r in rows.tolist()]
