"""Measures models: strawberry/bench has a module for each command, docs/benchmarks.md describes them.

    python bench.py compare air.json tinystar-v0.2-modernbase.json --tokens 5M    # losses at equal data and budget
    python bench.py decode air.json bin/air.strawberry --batches 1,64             # generated tokens/s
    python bench.py train --config air.json --profile                             # training tokens/s, parts of a step
    python bench.py growth --jobs 6                                               # speed and memory by window and width
    python bench.py scale --config air.json --processes 1,2,4                     # speed by number of processes
    python bench.py serve air.json --clients 16                                   # serve.py with many clients
    python bench.py recall air.json:window=16 --pairs 8 --distances 16,64,256     # accuracy on associative recall
    python bench.py speedrun --nanogpt_path ~/nanoGPT --data input.txt --config tinystar-v0.8-speedrun.json
                                                                                  # time to nanoGPT's best loss
    python bench.py kernels                                                       # Triton kernels, on a GPU

`config.json:key=value,key=value` changes keys of one config, `--set key=value` of all. Keys of the model need no
prefix: `air.json:r_layer=0` is `air.json:model_hyperparams.r_layer=0`.

Training runs are child processes, so that one that fails stops no other, and several share a device (--jobs). Speed is
measured separately, while nothing else runs.
"""

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import sys
from collections.abc import Callable

from strawberry.bench import (
    child_process,
    compare,
    decode,
    growth,
    kernels,
    recall,
    scale,
    serve,
    speedrun,
    speedrun_child,
    train,
)
from strawberry.common import UserError, nearest, run_cli

COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "compare": compare.run, "train": train.run, "growth": growth.run, "scale": scale.run, "decode": decode.run,
    "serve": serve.run, "kernels": kernels.run, "recall": recall.run, "speedrun": speedrun.run,
}  # fmt: skip
# What the commands start as processes of their own: `bench.py _train --config file.json`.
CHILDREN: dict[str, Callable[[list[str]], int | None]] = {
    "_train": train.train_child, "_speed": train.speed_child, "_step": train.step_child, "_race": train.race_child,
    "_nanogpt": train.nanogpt_child, "_scale": train.scale_child, "_recall": recall.recall_child,
    "_speedrun_nanogpt": speedrun_child.nanogpt_child, "_speedrun_strawberry": speedrun_child.strawberry_child,
    "_speedrun_probe": speedrun_child.probe_child,
}  # fmt: skip


def main(argv: list[str]) -> int | None:
    known = "\n".join(f"  {name:<10} {function.__doc__.splitlines()[0]}" for name, function in COMMANDS.items())
    usage = f"usage: python bench.py COMMAND …; python bench.py COMMAND --help says more\n\n{known}"
    if not argv:
        print(usage, file=sys.stderr)
        return 2
    name, *rest = argv
    if name in ("-h", "--help"):
        print(usage)
        return 0
    if name not in COMMANDS | CHILDREN:
        hint = nearest(name, [*COMMANDS, "--help"])
        raise UserError(f"{name!r} is no command; there are: {', '.join(COMMANDS)}{hint}")
    return CHILDREN[name](rest) if name in CHILDREN else run_command(name, rest)


def run_command(name: str, rest: list[str]) -> int | None:
    """Run a command. A signal that ends it also ends its children; the exit code is 128 + its number."""
    with child_process.interrupt_on_signals() as caught:
        try:
            code = COMMANDS[name](rest)
        except KeyboardInterrupt:
            if caught.number in (None, signal.SIGINT):
                raise
            print("terminated", file=sys.stderr)
            code = None
    return code if caught.number is None else 128 + caught.number


if __name__ == "__main__":
    run_cli(main)
