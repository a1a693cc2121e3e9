"""`bench.py scale`: the training speed with several processes, one for each GPU."""

import argparse
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path

from model import CONFIGS
from strawberry.argument_parser import ArgumentParser
from strawberry.bench import child_process
from strawberry.bench.common import (
    SCRIPT,
    list_json_output,
    list_spec_inputs,
    parse_assignment,
    parse_quantities,
    parse_quantity,
    split_spec,
    write_benchmark_config,
)
from strawberry.common import atomic_write
from strawberry.outputs import check_outputs
from strawberry.run_config import Run, load_run


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "bench.py scale",
        "Measure train.py's own loop on one process and on several of this machine, which torchrun starts.",
    )
    add = parser.add_argument
    add("--config", required=True, help="a config file; file.json:key=value,key=value changes keys of it")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key")
    add("--processes", default="1,2", help="numbers of processes, between commas (default 1,2)")
    add("--parallel", default="ddp", help="ddp, fsdp or both, with a comma (default ddp)")
    add("--steps", type=parse_quantity, default=30, help="measured steps, after 10 or as many others (default 30)")
    add("--same_batch", action="store_true", help="divide the config's batch among the processes (default: one each)")
    add("--json", type=Path, help="also write the measurements to this file")
    arguments = parser.parse_args(argv)
    arguments.processes = parse_quantities("--processes", arguments.processes)
    arguments.parallel = arguments.parallel.split(",")
    return arguments


def run(argv: list[str]) -> None:
    """Measure how training speeds up with processes, one for each GPU."""
    arguments = parse_arguments(argv)
    config, changes = split_spec(arguments.config)
    words = [f"--{key}={value}" for key, value in map(parse_assignment, (*arguments.set, *changes))]
    rows: list[dict] = []
    read = list_spec_inputs("--config", [config], [load_run(["--config", config, *words], CONFIGS)])
    check_outputs(list_json_output(arguments.json), read)
    for n, parallel in itertools.product(arguments.processes, arguments.parallel):
        if n == 1 and any(row["processes"] == 1 for row in rows):
            continue  # one process has nothing to divide
        run = load_run(["--config", config, *words, f"--parallel={parallel}"], CONFIGS)
        if not arguments.same_batch and run.batch_size != "auto":
            run.batch_size *= n
        rows.append({"parallel": parallel if n > 1 else "", **measure_processes(run, n, arguments.steps)})
        print(format_row(rows), flush=True)
        if arguments.json:
            atomic_write(arguments.json, json.dumps({"config": arguments.config, "rows": rows}, indent=1).encode())


def measure_processes(run: Run, processes: int, steps: int) -> dict:
    """Measure a run with this number of processes. Returns a row; {"why": …} if it fails."""
    command = [sys.executable, SCRIPT]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, SCRIPT]
    with tempfile.TemporaryDirectory() as folder:
        file = write_benchmark_config(Path(folder), run, log_interval=10**6)
        child = child_process.run_group([*command, "_scale", file, str(steps)])
    answers = [line for line in child.stdout.splitlines() if line.startswith("{")]
    if child.returncode or not answers:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "rror: " in line and "ChildFailed" not in line]
        return {"processes": processes, "why": (errors or lines or ["no output"])[0][:300]}
    warnings = sorted({line for line in child.stderr.splitlines() if line.startswith("warning: ")})
    return json.loads(answers[-1]) | {"warnings": warnings}


def format_row(rows: list[dict]) -> str:
    """The text of the last row. Its efficiency is relative to n times the speed of one process, if the first row has
    that.
    """
    row, first = rows[-1], rows[0]
    name = f"{row['processes']} {row['parallel']}".strip()
    if "why" in row:
        return f"{name:<8} {row['why']}"
    alone = row["processes"] * first.get("tokens_per_s", math.nan) if first["processes"] == 1 else math.nan
    share = "" if math.isnan(alone) else f"{row['tokens_per_s'] / alone:.1%} of {row['processes']} × one, "
    memory = f", {row['memory'] / 2**30:,.2f} GiB at most" if row["memory"] else ""
    link = f", {row['link_bytes_per_s'] / 1e9:,.1f} GB/s between them" if row["link_bytes_per_s"] else ""
    how = {True: "compiled", False: "not compiled"}.get(row["compile"], "blocks compiled")
    line = (
        f"{name:<8} {row['tokens_per_s']:>11,.0f} tokens/s, {share}"
        f"{row['step_ms']:,.2f} ms a step of {row['tokens_per_step']:,} tokens, loss {row['loss']:.6f}{memory}"
        f"{link}; {how}{', CUDA graph' if row['cuda_graph'] else ''}, ready after {row['ready_s']:,.0f} s"
    )
    return "\n".join([line, *(f"         {warning}" for warning in row["warnings"])])
