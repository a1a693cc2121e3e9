"""One module per operation: signature, plain PyTorch, dispatch."""
