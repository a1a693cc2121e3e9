"""Text in, batches out: documents, token files, splits, objectives, the loader."""
