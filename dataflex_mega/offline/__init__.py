"""Tools that run before a training run: embeddings of samples, nearest neighbours, TSDS."""
