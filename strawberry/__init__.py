"""The library that the scripts share, and `strawberry.train` for notebooks.

Importing it loads nothing else, and sets environment variables that libraries read when they are loaded
(strawberry/environment.py), so a script imports this package before torch.
"""

import importlib

from strawberry import environment

environment.set_defaults()


def train(config=None, *, quiet=False, **overrides):
    """Train a model as train.py does, and return the run: .model, .metrics, .plot(), .sample(prompt).

        run = strawberry.train("tiny.json", max_iters=100, model_hyperparams={"n_layer": 1})

    config: a JSON file, looked up as train.py's --config, or its content as a dict; None: every default. Keyword
    arguments override its keys. quiet: print warnings only.

    An interrupt (Ctrl-C, or the kernel's) finishes the step, saves a checkpoint and returns the run so far; a second
    one raises KeyboardInterrupt at once. Raises UserError for what the user can fix, and never exits.
    """
    return importlib.import_module("strawberry.notebook").train(config, quiet=quiet, **overrides)
