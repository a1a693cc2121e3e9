"""train.py --check: run all checks that a run makes before it writes its first file, and others that take seconds."""

import math
import os
import shutil
import time

from strawberry.common import UserError
from strawberry.training import cuda_graph, memory, setup
from strawberry.training.console import format_bytes, warn


def check_run(trainer) -> None:
    """Set up the run as train.py does before it writes its first file, run one batch, verify small datasets, and print
    estimates of memory and disk space. Writes nothing. Raises UserError for problems."""
    run = trainer.run
    trainer.set_up()
    start = time.perf_counter()
    loss = trainer.steps.warm_up(compile=False)
    seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise UserError(f"the loss of the first batch is {loss}: {cuda_graph.NON_FINITE_ADVICE}")
    read = sum(os.path.getsize(file.path) for file in trainer.corpus.files)
    for file in trainer.corpus.files if read <= setup.MAX_VERIFIED_BYTES else ():
        file.verify()
    need, rows = trainer.memory_planner.estimate(), trainer.rows
    total, (free, there) = need.fixed + rows * need.row, memory.device_memory(trainer.device)
    saved, disk = need.weights + need.optimizer, shutil.disk_usage(setup.nearest_existing(trainer.root))
    saved *= trainer.ranks.world if trainer.ranks.sharded else 1
    wanted = (run.checkpoints.keep + 2) * saved if run.checkpoints.create_checkpoints else 0
    lines = {
        "paths": f"{run.model_path} and {trainer.root} can be written",
        "fingerprints": f"dataset {trainer.corpus.fingerprint[:12]}…"
        f"{' (read whole)' if read <= setup.MAX_VERIFIED_BYTES else ''}, encoder {trainer.encoder.fingerprint[:12]}…",
        "memory": f"about {format_bytes(total)} ({need.describe(rows, run.model_hyperparams.block_size)}); "
        f"{format_bytes(free)} of {format_bytes(there)} are free",
        "disk": f"{format_bytes(saved)} a checkpoint, {format_bytes(wanted)} for those that are kept; "
        f"{format_bytes(disk.free)} are free",
        "first batch": f"loss {loss:.3f}, after {seconds:.2f} s, not compiled",
    }
    print("\n".join(f"{key:<12} {text}" for key, text in lines.items()))
    for message in run.warnings() if trainer.ranks.main else ():
        warn(message)
    if total > free:
        warn(f"that may be more memory than there is. {trainer.memory_planner.suggest_memory_cuts()}")
    if wanted > disk.free:
        warn("the checkpoints may fill the disk; lower checkpoints.keep, or name another checkpoints.path")
    print("all is well, and nothing was written")
