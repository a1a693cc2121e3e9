"""From text to batches: documents, token files, splits, objectives, the loader."""
