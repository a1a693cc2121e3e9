"""Measures models against each other: strawberry/bench, a module for each command.

    python bench.py compare air.json air.json:retention=none tinystar_v0.2.json --tokens 5M --seeds 3 --match params

compare trains each config on the same data, in the same order, with the same tokens per step, budget and schedule, the
learning rate tuned over the same grid for each, and writes what came out to img/compare: compare.md and compare.json, a
table; compare.png, validation bits per byte against tokens, FLOPs and seconds; runs/, a small file for each finished
run, by which the same command goes on after an interruption and redoes nothing.

`config.json:key=value,key=value` changes keys of one config, `--set key=value` of all. Keys of the model need no
prefix: `air.json:r_layer=0` is `air.json:model_hyperparams.r_layer=0`.

    python bench.py decode air.json tinystar-v0.2-modernbase.json bin/air.strawberry --batches 1,64 --contexts 128,8k

decode measures how fast text is made: tokens/s at each batch and context, beside the floor that reading weights and
cache sets at the speed at which this machine copies memory; a table and a picture in img/decode.
`decode --against nanogpt --nanogpt_path ~/nanoGPT` measures beside a nanoGPT checkout's generate.

    python bench.py train --config air.json strawberry-large.json:batch_size=16 --profile --json speed.json

train measures how fast configs train, in train.py's own loop: tokens/s, a step's parts, arithmetic beside what a large
matrix product reaches, memory, and with --profile what the GPU does. `train --against nanogpt --nanogpt_path ~/nanoGPT`
runs a nanoGPT checkout's own train.py and this one on the same text.

    python bench.py growth --jobs 6

growth measures and draws how tokens/s and memory of training change with the window and with the width.

    python bench.py scale --config air.json --processes 1,2,4 --parallel ddp,fsdp

scale measures how training speeds up with processes, one for each GPU: tokens/s, memory, the link between them.

    python bench.py serve air.json --clients 16 --rows 16

asks serve.py for texts from many clients at once, in turns with a server that makes one text at a time.

    python bench.py recall tinystar-v0.2-modernbase.json air.json:window=16 --pairs 8 --distances 16,64,256

recall trains configs on associative recall, and measures their accuracy by distance and by number of pairs.

    python bench.py speedrun --nanogpt_path ~/nanoGPT --config tinystar-v0.8-speedrun.json --data input.txt

speedrun trains with a nanoGPT checkout's own train.py, then a config until its validation loss is as low: seconds, with
compilation and without, and tokens.

    python bench.py kernels

holds each Triton kernel against float64 on a GPU, and times it.

compare's runs are child processes: train.py's own loop, each with a JSON file. So one that fails takes no other along,
and several share a device (--jobs). Speed is measured apart from them, while nothing else runs.
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
