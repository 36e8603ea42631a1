"""What is done before a run: embeddings of samples, nearest neighbours, TSDS."""
