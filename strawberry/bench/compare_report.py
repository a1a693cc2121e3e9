"""The tables and the picture of `bench.py compare`."""

import json
import math
import statistics
from collections.abc import Iterator

import torch

from strawberry.bench import hardware
from strawberry.bench.common import Entry, format_quantity, format_table, make_line_style, style_panel
from strawberry.bench.sweep import MIN_LR, OPTIMIZERS, OWN_RATES, USE_MUON, Plan, Sweep, uses_muon
from strawberry.bench.width import TOLERANCE
from strawberry.common import atomic_write
from strawberry.config import declared, to_dict
from strawberry.run_config import OptimizerHyperparams
from strawberry.training import plot


def compute_mean_and_sd(values: list[float]) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation with divisor n − 1). The deviation of a single value is None."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def average_curves(results: list[dict]) -> list[list[float]]:
    """[tokens, mean, standard deviation] for each number of tokens at which every seed was evaluated."""
    curves = [dict(map(tuple, result["curve"])) for result in results]
    places = [t for t in curves[0] if all(curve.get(t) is not None for curve in curves)] if curves else []
    return [[t, mean, deviation or 0.0]
            for t in places for mean, deviation in [compute_mean_and_sd([curve[t] for curve in curves])]]  # fmt: skip


def average_quarters(results: list[dict]) -> list[list[float | None]] | None:
    """[mean, standard deviation] over the seeds of the last validation loss of each quarter of the window, in nats per
    token. None if a seed has none: it diverged, or its model sees the future.
    """
    found = [result.get("quarters") for result in results if result["bpb"] is not None]
    if not found or None in found or len(found) < len(results):
        return None
    return [list(compute_mean_and_sd(list(values))) for values in zip(*found, strict=True)]


def make_row(entry: Entry, grid: list[dict], seeds: list[dict], speed: dict | None) -> dict:
    """The results of one config as plain data. bpb is None if a seed diverged or a run failed."""
    values = [result["bpb"] for result in seeds]
    mean, deviation = compute_mean_and_sd(values) if values and None not in values else (None, None)
    return {
        "label": entry.label, "arch": entry.run.model_hyperparams.arch,
        "optimizer": OPTIMIZERS[entry.run.optimizer_hyperparams.use_muon],
        "params": entry.params, "params_total": entry.params_total, "params_tables": entry.params_tables,
        "flops_per_token": entry.flops,
        "tokens_per_s": speed and speed["tokens_per_s"], "memory": speed and speed["memory"],
        "compiled": speed and speed["compiled"],
        "lr": seeds[0]["lr"] if seeds else None, "bpb": mean, "bpb_sd": deviation, "bpb_seeds": values,
        "quarters": average_quarters(seeds),
        "grid": {f"{OPTIMIZERS[uses_muon(result['run'])]} {result['lr']:g}": result["bpb"] for result in grid},
        "curve": average_curves(seeds), "changes": entry.changes, "failure": entry.failure,
        "model_hyperparams": to_dict(entry.run.model_hyperparams),
        "optimizer_hyperparams": to_dict(entry.run.optimizer_hyperparams),
    }  # fmt: skip


def format_bpb(row: dict) -> str:
    if row["failure"]:
        return "failed"
    if row["bpb"] is None:
        return f"diverged ({row['bpb_seeds'].count(None)} of {len(row['bpb_seeds'])})"
    return format_mean(row["bpb"], row["bpb_sd"])


def sort_by_bpb(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: math.inf if row["bpb"] is None else row["bpb"])


def format_main_table(rows: list[dict]) -> str:
    """The table of the models, sorted by bits per byte, best first."""
    memory, tables = any(row["memory"] for row in rows), any(row["params_tables"] for row in rows)
    header = ["model", "optimizer", "learning rate", "parameters, non-embedding", *["value tables"] * tables, "total",
              "MFLOP / token", "tokens/s"]  # fmt: skip
    header += ["memory, GB"] * memory + ["validation, bits per byte"]
    lines = []
    for row in sort_by_bpb(rows):
        line = [row["label"], row["optimizer"], f"{row['lr']:g}" if row["lr"] else "–", f"{row['params']:,}",
                *[f"{row['params_tables']:,}"] * tables, f"{row['params_total']:,}",
                f"{row['flops_per_token'] / 1e6:.1f}",
                f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "–"]  # fmt: skip
        line += [f"{row['memory'] / 1e9:.2f}" if row["memory"] else "–"] * memory
        lines.append([*line, format_bpb(row)])
    return format_table(header, lines)


def format_quarter_table(rows: list[dict]) -> str:
    """The table of the losses by quarter of the window, in the order of the main table."""
    header = ["validation loss by quarter of the window, nats per token", "first", "second", "third", "last"]
    lines = [[row["label"], *("–" if pair is None else format_mean(*pair) for pair in row["quarters"] or [None] * 4)]
             for row in sort_by_bpb(rows)]  # fmt: skip
    return format_table(header, lines)


def format_mean(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def format_grid_table(rows: list[dict], plan: Plan) -> str:
    """The table of the learning rate grid: bits per byte of every run, a row for each model and optimizer."""
    lines, rates = [], sorted({*plan.lrs, *(plan.muon_lrs or ())})
    for row in sort_by_bpb(rows):
        for optimizer in [OPTIMIZERS[USE_MUON[name]] for name in plan.optimizers] or [row["optimizer"]]:
            cells = [row["grid"].get(f"{optimizer} {lr:g}", "–") for lr in rates]
            shown = ["diverged" if c is None else c if c == "–" else f"{c:.4f}" for c in cells]
            lines.append([row["label"] + f", {optimizer}" * bool(plan.optimizers), *shown])
    return format_table(["learning rate, seed 1", *(f"{lr:g}" for lr in rates)], lines)


def describe_optimizers(plan: Plan) -> str:
    names = [OPTIMIZERS[USE_MUON[name]] for name in plan.optimizers]
    if len(names) < 2:
        return f"{names[0]} for all" if names else "each config's own"
    return f"for each model the better of {' and '.join(names)}, chosen with the learning rate"


def describe_rates(plan: Plan) -> str:
    adamw, muon = (", ".join(f"{lr:g}" for lr in plan.list_rates(muon)) for muon in (False, True))
    return f"{adamw} for each model" if adamw == muon else f"{adamw} with AdamW, of {muon} with Muon for each model"


def list_settings(entries: list[Entry], plan: Plan) -> list[str]:
    """Sentences that state how the results were measured."""
    run = entries[0].run
    T, rows = run.model_hyperparams.block_size, run.batch_size * run.gradient_accumulation_steps
    evaluated = run.eval_iters * run.batch_size * T
    rate = f"{describe_rates(plan)}, not tuned." if len(plan.lrs) == 1 and len(plan.muon_lrs or [0]) == 1 else (
        f"the best of {describe_rates(plan)}, by the last validation bits per byte with seed 1; that run is also the "
        "first of the mean, which favors all models alike.")  # fmt: skip
    return [
        f"Data: {run.dataset.path}, encoder {run.encoder_path} ({run.model_hyperparams.vocab_size:,} tokens); the same "
        "order for all, given the seed.",
        f"Budget: {plan.tokens:,} tokens = {plan.steps:,} steps of {rows} rows of {T} tokens.",
        f"Schedule: warmup {plan.warmup:g} and cooldown {plan.cooldown:g} of the steps, down to {MIN_LR:g} of the "
        "learning rate.",
        f"Optimizer: {describe_optimizers(plan)}.",
        f"Learning rate: {rate}",
        f"Validation: the same {evaluated:,} tokens at most, for all; ± is the standard deviation over "
        f"{plan.seeds} seeds (n − 1)." if plan.seeds > 1 else
        f"Validation: the same {evaluated:,} tokens at most, for all; one seed, so the deviation is unknown.",
        f"Speed: training steps of each model alone on {hardware.describe_device(plan.device)}, "
        f"torch {torch.__version__}, the median of ten intervals; "
        "seconds in the picture are tokens by this speed, without evaluation and compilation.",
        "FLOPs: forward and backward, attention by the pairs of tokens that its pattern includes.",
    ]  # fmt: skip


def iter_config_differences(entries: list[Entry], chosen: bool) -> Iterator[str]:
    """Yield a sentence for each difference between the configs that is not part of the architecture. `chosen`: whether
    the optimizers were chosen by this command."""
    muon = any(entry.run.optimizer_hyperparams.use_muon for entry in entries)
    hidden = () if muon else ("momentum", "muon_lr", "muon_beta2")
    hidden += ("use_muon",) if chosen else ()
    names = [name for name in declared(OptimizerHyperparams) if name not in hidden]
    keys = [("optimizer_hyperparams", name) for name in names]
    for section, name in [*keys, ("model_hyperparams", "dropout")]:
        labels: dict[str, list[str]] = {}
        for entry in entries:
            value = getattr(getattr(entry.run, section), name)
            labels.setdefault(json.dumps(value), []).append(entry.label)
        if len(labels) > 1:
            differences = "; ".join(f"{value} for {', '.join(those)}" for value, those in labels.items())
            yield f"{name} is each config's own: {differences}. --set {name}=… makes it the same."
    for name in OWN_RATES:
        if name not in hidden and any(getattr(entry.run.optimizer_hyperparams, name) for entry in entries):
            yield f"{name}, where a config sets it, keeps its proportion to the learning rate."


def list_caveats(entries: list[Entry], rows: list[dict], plan: Plan) -> list[str]:
    """Sentences about what limits the comparison: changed keys, differences between configs, failures."""
    found = [f"{entry.label}: changed: {', '.join(entry.changes)}." for entry in entries if entry.changes]
    found += iter_config_differences(entries, bool(plan.optimizers))
    sizes = [entry.params for entry in entries]
    if max(sizes) > min(sizes) * (1 + 2 * TOLERANCE):
        found.append(
            f"Sizes differ: from {min(sizes):,} to {max(sizes):,} non-embedding parameters; --match params "
            "makes them the same."
        )
    for find_edge, what in ((min, "smallest"), (max, "largest")):
        rates = {row["label"]: plan.list_rates(row["optimizer"] == "Muon") for row in rows}
        at_edge = [row["label"] for row in rows
                   if len(rates[row["label"]]) > 1 and row["lr"] == find_edge(rates[row["label"]])]  # fmt: skip
        if at_edge:
            found.append(
                f"The best learning rate is the grid's {what} for {', '.join(at_edge)}: a better one may lie beyond."
            )
    eager = [row["label"] for row in rows if row["compiled"] is False]
    if 0 < len(eager) < len(rows):
        found.append(f"Not compiled, unlike the others, and slower for it: {', '.join(eager)}.")
    non_causal = [entry.label for entry in entries if not entry.causal]
    if non_causal:
        found.append(
            f"{', '.join(non_causal)}: sees the future, so that its bits per byte are those of the strict loss, "
            "estimated from 512 positions."
        )
    found += [f"{row['label']}: failed: {row['failure']}" for row in rows if row["failure"]]
    return found


def format_report(entries: list[Entry], rows: list[dict], plan: Plan, command: str) -> str:
    """The text of compare.md."""
    parts = [format_main_table(rows), "![validation bits per byte against tokens, FLOPs and seconds](compare.png)"]
    parts.append("\n".join(f"- {line}" for line in list_settings(entries, plan) + list_caveats(entries, rows, plan)))
    if any(row["quarters"] for row in rows):
        parts.append(format_quarter_table(rows))
    if len(plan.lrs) > 1 or len(plan.muon_lrs or ()) > 1 or len(plan.optimizers) > 1:
        parts.append(format_grid_table(rows, plan))
    return "\n\n".join([*parts, f"```\n{command}\n```"]) + "\n"


PANELS = {  # x axis → its units per training token
    "training tokens": lambda row: 1.0,
    "training FLOPs": lambda row: row["flops_per_token"],
    "training time, alone on the device (s)": lambda row: row["tokens_per_s"] and 1 / row["tokens_per_s"],
}


def draw_comparison(rows: list[dict], title: str, seeds: int):
    """A figure with three panels: bits per byte against tokens, FLOPs and seconds. Bands show one standard deviation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in sort_by_bpb(rows) if row["curve"]]
    columns = 2 if max((len(row["label"]) for row in shown), default=0) > 34 else 3
    fig = Figure(figsize=(11, 4.3 + 0.2 * math.ceil(len(shown) / columns)), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(1, 3, sharey=True)
    order = {row["label"]: i for i, row in enumerate(rows)}  # colours follow the command line's order
    for ax, (xlabel, per_token) in zip(panels, PANELS.items(), strict=True):
        for row in shown:
            if per_token(row):
                draw_curve(ax, row, per_token(row), order[row["label"]])
        style_panel(ax, xlabel)
    panels[0].set_ylabel("validation (bits per byte)", fontsize=11)
    set_limits(panels, shown)
    fig.suptitle(title, fontsize=12, x=0.01, ha="left")
    if shown:
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9,
                   frameon=False, title=f"final value, {'one seed' if seeds == 1 else f'mean ± sd of {seeds} seeds'}",
                   title_fontsize=9)  # fmt: skip
    return fig


def draw_curve(ax, row: dict, scale: float, number: int) -> None:
    tokens, mean, deviation = zip(*row["curve"], strict=True)
    xs, style = [t * scale for t in tokens], make_line_style(number)
    ax.plot(xs, mean, **style, markevery=[len(xs) - 1], label=f"{row['label']}  {format_bpb(row)}")
    low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
    ax.fill_between(xs, low, high, color=style["color"], alpha=0.18, linewidth=0)


def set_limits(panels, rows: list[dict]) -> None:
    """Set the y limits from the best value to the worst value after a tenth of the budget: until then, all curves fall.
    Set the x limits to the points in that range.
    """
    curves = [[mean for _, mean, _ in row["curve"]] for row in rows]
    if not curves:
        return
    low = min(mean - deviation for row in rows for _, mean, deviation in row["curve"])
    high = max(curve[min(len(curve) // 10, len(curve) - 1)] for curve in curves)
    margin = 0.05 * (high - low or 1)
    panels[0].set_ylim(low - margin, high + margin)
    for ax in panels:
        seen = [x for line in ax.lines for x, y in line.get_xydata() if y <= high]
        if seen and min(seen) < max(seen):
            ax.set_xlim(min(seen) * 0.85, max(seen) * 1.18)


def write_results(sweep: Sweep, command: str) -> str:
    """Write compare.md, compare.json and compare.png. Returns the main table."""
    entries, plan = sweep.entries, sweep.plan
    rows = []
    for entry in entries:
        grid = [sweep.results[trial.key] for trial in sweep.grid[entry.label] if trial.key in sweep.results]
        seeds = [sweep.results[trial.key] for trial in sweep.list_seed_trials(entry) if trial.key in sweep.results]
        rows.append(make_row(entry, grid, seeds, sweep.speeds.get(entry.label)))
    text = format_report(entries, rows, plan, command)
    about = {"tokens": plan.tokens, "steps": plan.steps, "tokens_per_step": plan.tokens_per_step, "lrs": plan.lrs,
             "muon_lrs": plan.muon_lrs,
             "seeds": plan.seeds, "warmup": plan.warmup, "cooldown": plan.cooldown,
             "device": hardware.describe_device(plan.device), "torch": torch.__version__,
             "fingerprints": plan.data, "command": command}  # fmt: skip
    notes = list_settings(entries, plan) + list_caveats(entries, rows, plan)
    atomic_write(plan.out / "compare.json", json.dumps(about | {"rows": rows, "notes": notes}, indent=1).encode())
    atomic_write(plan.out / "compare.md", text.encode())
    block = entries[0].run.model_hyperparams.block_size
    title = (
        f"{format_quantity(plan.tokens)} tokens, context {block}, {format_quantity(plan.tokens_per_step)} tokens a step"
    )
    plot.save(draw_comparison(rows, title, plan.seeds), plan.out / "compare.png")
    return format_main_table(rows)
