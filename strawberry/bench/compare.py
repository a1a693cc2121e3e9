"""`bench.py compare`: train several configs under equal conditions; write a table and a picture."""

import argparse
import sys
from pathlib import Path

from strawberry.argument_parser import ArgumentParser
from strawberry.bench import child_process
from strawberry.bench.common import (
    Entry,
    check_results,
    format_command,
    format_quantity,
    format_table,
    list_spec_inputs,
    load_entries,
    parse_count,
    parse_learning_rates,
    parse_override,
    parse_quantity,
)
from strawberry.bench.compare_report import list_caveats, list_settings, write_results
from strawberry.bench.sweep import USE_MUON, Plan, Sweep, hash_code, measure_speeds
from strawberry.bench.width import match_params
from strawberry.common import UserError
from strawberry.device import choose_device
from strawberry.training import setup


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "bench.py compare",
        "Train several configs under equal conditions; write a table and a picture. After an interruption, the same "
        "command continues.",
    )
    add = parser.add_argument
    add("configs", nargs="+", help="config files; file.json:key=value,key=value changes keys of one")
    add("--tokens", type=parse_quantity, default=parse_quantity("5M"), help="training tokens of each run (default 5M)")
    add("--seeds", type=parse_count, default=3, help="runs of each config with its best learning rate (default 3)")
    add("--lrs", default="1e-3,3e-3,1e-2", help="learning rates to choose from (default 1e-3,3e-3,1e-2)")
    add("--muon_lrs", help="learning rates to choose from with Muon (default: --lrs)")
    add("--optimizers", help="adamw,muon: choose each model's optimizer too (default: each config's own)")
    add("--warmup", type=float, default=0.05, help="share of the steps with rising learning rate (default 0.05)")
    add("--cooldown", type=float, default=0.4, help="share of the steps with falling learning rate (default 0.4)")
    add("--match", choices=["params"], help="resize widths until all have equally many non-embedding parameters")
    add(
        "--params", type=parse_quantity, help="the number for --match params (default: that of the first config)"
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a key for all configs; may be repeated")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: cuda, else mps, else cpu")
    add("--jobs", type=parse_count, help="runs at once, divided among the GPUs (default: one on each)")
    add("--out", default="img/compare", type=Path, help="directory of the results (default img/compare)")
    arguments = parser.parse_args(argv)
    for name in ("warmup", "cooldown"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: is a share of the steps, between 0 and 1")
    if arguments.params and not arguments.match:
        raise UserError(f"--params {arguments.params}: is the target of --match params; add --match params")
    arguments.lrs = parse_learning_rates(arguments.lrs)
    given = arguments.muon_lrs
    arguments.muon_lrs = parse_learning_rates(given, "--muon_lrs") if given is not None else None
    arguments.optimizers = parse_optimizers(arguments.optimizers)
    return arguments


def parse_optimizers(text: str | None) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.split(","))) if text is not None else ()
    if wrong := [name for name in found if name not in USE_MUON]:
        raise UserError(f"--optimizers {text}: {wrong[0]!r} is none of {', '.join(USE_MUON)}")
    return found


def make_plan(arguments, entries: list[Entry]) -> Plan:
    """The plan of all runs. Raises UserError, before any training, if the data, the batch size or the budget is
    unsuitable.
    """
    run = entries[0].run
    if run.batch_size == "auto":
        raise UserError('batch_size = "auto": all runs need equal batches; give a number, --set batch_size=32')
    with_muon = [entry.run.optimizer_hyperparams.use_muon for entry in entries]
    if arguments.muon_lrs and not ("muon" in arguments.optimizers if arguments.optimizers else any(with_muon)):
        raise UserError("--muon_lrs: no config is trained with Muon; add --optimizers adamw,muon or "
                        "--set use_muon=true, or leave --muon_lrs out")  # fmt: skip
    device = choose_device(arguments.device)
    jobs = arguments.jobs or child_process.GpuPool(device.type).lanes
    encoder, corpus = setup.load_data(run)
    per_step = run.batch_size * run.gradient_accumulation_steps * run.model_hyperparams.block_size
    steps = round(arguments.tokens / per_step)
    if steps < 10:
        raise UserError(
            f"--tokens {arguments.tokens:,}: is {steps} steps of {per_step:,} tokens, too few to compare "
            f"anything; give at least {10 * per_step:,}, or --set batch_size=… smaller"
        )
    prints = {"dataset": corpus.fingerprint, "encoder": encoder.fingerprint, "code": hash_code()}
    return Plan(steps, per_step, arguments.warmup, arguments.cooldown, arguments.lrs, arguments.seeds, jobs,
                device, arguments.out, prints, arguments.optimizers, arguments.muon_lrs)  # fmt: skip


def print_summary(entries: list[Entry], sweep: Sweep) -> None:
    """Print the models, the settings and the number of runs before the training begins, which can take hours."""
    plan = sweep.plan
    tables = any(e.params_tables for e in entries)
    rows = [[e.label, f"{e.params:,}", *[f"{e.params_tables:,}"] * tables, f"{e.params_total:,}",
             f"{e.flops / 1e6:.1f}"] for e in entries]  # fmt: skip
    header = ["model", "parameters, non-embedding", *["value tables"] * tables, "total", "MFLOP / token"]
    print(format_table(header, rows))
    print("\n".join(["", *list_settings(entries, plan), *list_caveats(entries, [], plan)]))
    amount = f"{sweep.total} runs of {format_quantity(plan.tokens)} tokens, {plan.jobs} at once"
    print(f"{amount}; {sweep.count_done()} of them are done already")
    grid = [trial for trials in sweep.grid.values() for trial in trials if trial.key not in sweep.results]
    stale = sum(bool(list(plan.runs.glob(f"{trial.key.partition('-')[0]}-*.json"))) for trial in grid)
    if stale:
        print(f"{stale} results in {plan.runs} are of another version of the code, and are not used")
    print(flush=True)


def run(argv: list[str]) -> int | None:
    """Train several configs under equal conditions; write a table and a picture."""
    arguments = parse_arguments(argv)
    common = [parse_override(text) for text in arguments.set]
    entries = load_entries(arguments.configs, common)
    if arguments.match:
        match_params(entries, arguments.params or entries[0].params, common)
    read = list_spec_inputs("configs", (entry.file for entry in entries), (entry.run for entry in entries))
    check_results("compare", arguments.out, argv, read)
    plan = make_plan(arguments, entries)
    sweep = Sweep(entries, plan)
    print_summary(entries, sweep)
    try:
        sweep.speeds = measure_speeds(entries, plan)
        sweep.run()
        sweep.speeds |= measure_speeds(sweep.choose_optimizers(), plan)
    except KeyboardInterrupt:
        again = format_command(setup.relative_path(sys.executable), "compare", argv)
        print(
            f"\ninterrupted: {sweep.count_done()} of {sweep.total} runs are finished and kept in {plan.runs}; "
            f"to go on:\n    {again}",
            flush=True,
        )
        return 130
    text = write_results(sweep, format_command("python", "compare", argv))
    print(f"\n{text}\n\nthe table and the picture are in {plan.out}")
    failed = [f"{entry.label} ({entry.failure})" for entry in entries if entry.failure]
    if failed:
        raise UserError(f"{len(failed)} of {len(entries)} configs failed: {'; '.join(failed)}")
    return 0
