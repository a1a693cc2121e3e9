"""To and from Hugging Face's formats: layouts (classes of transformers that compute the same), tokenizer, export, and
checkpoints of GPT-2's shape as initial weights."""
