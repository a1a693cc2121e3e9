"""From a model to text: loading, the decoding engine, sampling, stop strings, scores."""
