"""Training: set-up, steps, checkpoints, evaluation. train.py has the training loop."""
