"""The table and the picture of `bench.py speedrun`."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from strawberry.bench.common import format_quantity, format_table, style_axes
from strawberry.bench.compare_report import compute_mean_and_sd
from strawberry.common import atomic_write
from strawberry.training import plot

NANOGPT, STRAWBERRY = "nanogpt", "strawberry"  # the sides
NAMES = {NANOGPT: "nanoGPT", STRAWBERRY: "strawberry"}
HEADER = ["run", "learning rate", "validation loss", "steps", "tokens", "seconds in steps", "compilation",
          "seconds with compilation"]  # fmt: skip
MEASURES = {  # name → value of a row, for the ratios of the means
    "seconds in steps": lambda row: row["seconds"],
    "seconds with compilation": lambda row: row["seconds"] + row["compile_s"],
    "tokens": lambda row: row["tokens"],
}


def find_best_point(result: dict) -> list | None:
    """The first point of a curve with its lowest loss; None if no loss is finite."""
    points = [point for point in result["curve"] if point[3] is not None]
    return min(points, key=lambda point: point[3], default=None)


def find_reached_point(result: dict, target: float) -> list | None:
    """The first point of a curve whose loss is at most the target."""
    return next((point for point in result["curve"] if point[3] is not None and point[3] <= target), None)


def make_row(side: str, config: str, lr: float, seed: int, target: float, result: dict) -> dict:
    """A run as plain data: its first point at or below the target; if there is none, its best one."""
    reached = find_reached_point(result, target)
    step, tokens, seconds, loss = reached or find_best_point(result) or (0, 0, 0.0, None)
    return {"config": config, "side": side, "lr": lr, "seed": seed, "target": target, "reached": reached is not None,
            "step": step, "tokens": tokens, "seconds": seconds, "loss": loss} | result  # fmt: skip


def format_row(row: dict) -> list[str]:
    name = f"{NAMES[row['side']]}, seed {row['seed']}"
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    if not row["reached"]:
        above = "" if row["loss"] is None else f", {row['loss'] - row['target']:.4f} above nanoGPT's"
        loss = f"not reached: best {loss} at step {row['step']:,}{above}"
    seconds = (row["seconds"], row["compile_s"], row["seconds"] + row["compile_s"])
    return [name, f"{row['lr']:g}", loss, f"{row['step']:,}", format_quantity(row["tokens"]),
            *(f"{value:,.1f}" for value in seconds)]  # fmt: skip


def format_mean(rows: list[dict]) -> list[str]:
    """Mean ± standard deviation (n − 1) over the seeds of a side; dashes where one has not reached its target."""
    name = f"**{NAMES[rows[0]['side']]}, mean of {len(rows)}**"
    if not all(row["reached"] for row in rows):
        return [name, f"{rows[0]['lr']:g}", f"not reached by {sum(not row['reached'] for row in rows)}", *"–––––"]

    def show(get: Callable, format_number: Callable) -> str:
        mean, deviation = compute_mean_and_sd([get(row) for row in rows])
        return format_number(mean) + ("" if deviation is None else f" ± {format_number(deviation)}")

    cells = [(lambda row: row["loss"], "{:.4f}".format), (lambda row: row["step"], "{:,.0f}".format),
             (lambda row: row["tokens"], format_quantity), (lambda row: row["seconds"], "{:,.1f}".format),
             (lambda row: row["compile_s"], "{:,.1f}".format), (MEASURES["seconds with compilation"],
                                                                 "{:,.1f}".format)]  # fmt: skip
    return [name, f"{rows[0]['lr']:g}", *(show(*cell) for cell in cells)]


def split_sides(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    theirs, ours = ([row for row in rows if row["side"] == side] for side in (NANOGPT, STRAWBERRY))
    return theirs, ours


def compute_ratios(rows: list[dict]) -> dict[str, float] | None:
    """Our mean as a share of nanoGPT's, of each of MEASURES. None if a run of ours has not reached its target."""
    theirs, ours = split_sides(rows)
    if not all(row["reached"] for row in ours):
        return None
    means = {name: [statistics.fmean(map(get, side)) for side in (ours, theirs)] for name, get in MEASURES.items()}
    return {name: mine / other for name, (mine, other) in means.items() if other}


def format_ratios(rows: list[dict]) -> str:
    ratios = compute_ratios(rows)
    if ratios is None:
        return "Not every run of strawberry reached nanoGPT's loss, so that there is no ratio: give more --steps."
    shares = ", ".join(f"{ratio:.3f} of its {name}" for name, ratio in ratios.items())
    return f"strawberry reaches nanoGPT's best validation loss in {shares} (ratios of the means)."


def format_runs(rows: list[dict]) -> str:
    """The table: each run, then the mean of each side."""
    lines = [format_row(row) for row in rows]
    lines += [format_mean(side) for side in split_sides(rows) if len(side) > 1]
    return format_table(HEADER, lines)


def format_grid(grid: list[dict]) -> str:
    """The learning rates that each side chose from, with seed 1."""
    lines = []
    for row in grid:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        lines.append([NAMES[row["side"]], f"{row['lr']:g}", loss, f"{row['seconds']:,.1f}" if row["reached"] else "–"])
    return format_table(["learning rates, seed 1", "learning rate", "validation loss", "seconds in steps"], lines)


def list_edges(grid: list[dict], rows: list[dict]) -> list[str]:
    """A sentence for each side whose best learning rate is an end of its grid."""
    found = []
    for side in split_sides(rows):
        name = side[0]["side"]
        lrs = [row["lr"] for row in grid if row["side"] == name]
        if len(lrs) > 1 and side[0]["lr"] in (min(lrs), max(lrs)):
            found.append(f"{NAMES[name]}'s best learning rate, {side[0]['lr']:g}, is an end of its grid: a better one "
                         "may lie beyond.")  # fmt: skip
    return found


NOTES = (
    "nanoGPT's loss is the lowest of its run, and its seconds end where it first reaches it. strawberry's run with the "
    "same seed ends at its first evaluation that is as low.",
    "Seconds in steps are read after the device has finished, without evaluations, checkpoints and compilation. "
    "Compilation is the time from the start of train.py to the end of the first step, minus the time of a step, with "
    "empty caches.",
)


def write_speedrun(out: Path, rows: list[dict], grid: list[dict], notes: list[str], command: str) -> str:
    """Write speedrun.md, speedrun.json and speedrun.png. Returns the table and the ratios."""
    text = f"{format_runs(rows)}\n\n{format_ratios(rows)}"
    notes = [*notes, *NOTES, *list_edges(grid, rows), f"Measured on {rows[0]['machine']}, torch {rows[0]['torch']}."]
    parts = [text, "![validation loss against seconds and tokens](speedrun.png)", "\n".join(f"- {n}" for n in notes)]
    parts += [format_grid(grid)] if len(grid) > 2 else []
    atomic_write(out / "speedrun.md", ("\n\n".join([*parts, f"```\n{command}\n```"]) + "\n").encode())
    found = {"command": command, "rows": rows, "grid": grid, "ratios": compute_ratios(rows), "notes": notes}
    atomic_write(out / "speedrun.json", json.dumps(found, indent=1).encode())
    plot.save(draw_speedrun(rows, f"To nanoGPT's best validation loss, {rows[0]['machine']}"), out / "speedrun.png")
    return text


def draw_speedrun(rows: list[dict], title: str):
    """A figure with two panels: validation loss against seconds in steps and against tokens, a line for each run. The
    dashed lines are the losses to reach; a dot is where a run reaches its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 4.6), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(1, 2, sharey=True)
    for ax, (column, xlabel) in zip(panels, ((2, "seconds in training steps"), (1, "training tokens")), strict=True):
        for side, colour in zip(split_sides(rows), plot.COLOURS, strict=False):
            for number, row in enumerate(side):
                draw_run(ax, row, column, colour, f"{NAMES[row['side']]}{describe_mean(side)}" if not number else None)
        for number, target in enumerate(sorted({row["target"] for row in rows})):
            label = None if number else "nanoGPT's best validation loss"
            ax.axhline(target, color="0.35", linestyle=(0, (5, 3)), linewidth=0.9, label=label)
        style_axes(ax, xlabel)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(plot.short_number)
    panels[0].set_ylabel("validation loss (nats per token)", fontsize=11)
    panels[0].set_ylim(*choose_limits(rows))
    fig.suptitle(title, fontsize=12, x=0.01, ha="left")
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return fig


def describe_mean(side: list[dict]) -> str:
    if not all(row["reached"] for row in side):
        return ", not reached"
    return f", {statistics.fmean(row['seconds'] for row in side):,.1f} s"


def draw_run(ax, row: dict, column: int, colour: str, label: str | None) -> None:
    points = [point for point in row["curve"] if point[0] and point[3] is not None]
    ax.plot([p[column] for p in points], [p[3] for p in points], color=colour, linewidth=1.3, alpha=0.85, label=label)
    if row["reached"]:
        ax.plot([row["seconds"] if column == 2 else row["tokens"]], [row["loss"]], "o", color=colour, markersize=5,
                markeredgecolor="white", markeredgewidth=0.8, zorder=3)  # fmt: skip


def choose_limits(rows: list[dict]) -> tuple[float, float]:
    """y limits: from the lowest loss to the highest after a tenth of each curve, until which all fall steeply."""
    curves = [[point[3] for point in row["curve"] if point[0] and point[3] is not None] for row in rows]
    low = min(min(curve) for curve in curves if curve)
    high = max(curve[min(len(curve) // 10, len(curve) - 1)] for curve in curves if curve)
    margin = 0.05 * (high - low or 1)
    return low - margin, high + margin
