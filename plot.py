"""The curves of a run, or of several on one sheet, from their metrics.jsonl.

    python plot.py bin/ck/metrics.jsonl                                    # into img/
    python plot.py bin/ck_a/metrics.jsonl bin/ck_b/metrics.jsonl --out img/compare --x tokens

train.py calls `curves` at each evaluation. matplotlib is imported by the functions that draw, so that nothing else
needs it, and draws with Agg, which needs no screen.

Index:  reading · style · the three sheets · the command
"""

import argparse
import contextlib
import io
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from options import UserError, atomic_write, run_cli
from strawberry.common import Input, Output, check_outputs, has_kind

# Okabe and Ito's colours, which the colour-blind tell apart too (https://jfly.uni-koeln.de/color/)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
AXES = {"step": "step", "tokens": "tokens", "seconds": "time in training steps (s)"}

POINTS = 2000  # of a curve: more than a picture of this width can show

# ---- reading -------------------------------------------------------------------------------------------------------


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl; what a kill left half written is skipped."""
    return list(each_line(path))


def each_line(path: str | os.PathLike) -> Iterator[dict]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line


def read_points(path: str | os.PathLike) -> list[dict]:
    """read_metrics for a picture, in memory that does not grow with the run: all evaluations, and of the logged steps
    every one, or every second, fourth, … so that they are POINTS at most."""
    kept, every, n = [], 1, 0  # (number among the logged steps, line); the first and evaluations have 0, and stay
    for line in each_line(path):
        number = n if "loss" in line else 0
        n += "loss" in line
        if number % every == 0:
            kept.append((number, line))
        if n > POINTS * every:
            every *= 2
            kept = [(number, line) for number, line in kept if number % every == 0]
    return [line for _, line in kept]


def series(lines: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """The points of a curve: lines that have both. An evaluation has no `seconds` of its own: the last line's hold."""
    xs, ys, latest = [], [], None
    for line in lines:
        latest = line.get(x, latest)
        if latest is not None and line.get(y) is not None:
            xs.append(latest)
            ys.append(line[y])
    return xs, ys


def run_names(paths: list[Path]) -> list[str]:
    """A short name for each run: its directory's, or as much of the path as tells it from the others."""
    for depth in range(1, max(len(path.resolve().parts) for path in paths)):
        names = ["/".join(path.resolve().parent.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


# ---- style ---------------------------------------------------------------------------------------------------------


def figure(title: str, x: str, ylabel: str):
    """(figure, axes) in the look that all sheets share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot()
    ax.set_title(title, fontsize=12, loc="left")
    ax.set_xlabel(AXES[x], fontsize=11)
    ax.set_ylabel(ylabel, fontsize=11)
    ax.tick_params(labelsize=10, color="0.5", which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.5")
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_formatter(short_number)
    return fig, ax


def short_number(value: float, position=None) -> str:
    """An axis' number: 2000 → 2k, 12500000 → 12.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def png(fig) -> bytes:
    data = io.BytesIO()
    fig.savefig(data, format="png")
    return data.getvalue()


def save(fig, path: Path) -> None:
    atomic_write(path, png(fig))


def legend(ax, place: str = "best") -> None:
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(fontsize=10, facecolor="white", edgecolor="none", framealpha=0.9, loc=place)


# ---- the three sheets ----------------------------------------------------------------------------------------------


def loss_sheet(runs: dict[str, list[dict]], x: str):
    """Loss against x, on a log scale: every logged step faint, both evaluations bold, the strict loss dotted."""
    fig, ax = figure("Loss", x, "cross-entropy (nats per token)")
    single = len(runs) == 1
    for i, (name, lines) in enumerate(runs.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        of = "" if single else f"{name}, "
        ax.plot(*series(lines, x, "loss"), color=colour, alpha=0.35, linewidth=0.8, label="batch" if single else None)
        if single:
            ax.plot(*series(lines, x, "train_loss"), color=colour, marker="s", markersize=4, label="training")
            colour = COLOURS[1]
        ax.plot(*series(lines, x, "val_loss"), color=colour, marker=marker, markersize=4, label=f"{of}validation")
        strict = series(lines, x, "strict_loss")
        if strict[0]:
            style = {"color": colour, "linestyle": ":", "marker": "x", "markersize": 5}
            ax.plot(*strict, label=f"{of}validation, strict", **style)
    log_ticks(ax)
    legend(ax)
    return fig


def log_ticks(ax) -> None:
    """A log scale with plain numbers at round places: its usual ticks, powers of ten, would leave one or none."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = [y for line in ax.lines for y in line.get_ydata()]
    if not values or min(values) <= 0:
        return
    low, high = min(values), max(values)
    ax.set_yscale("log")
    ax.set_ylim(low * 0.96, high * 1.04)
    wide = high / low > 20
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()


def learning_rate_sheet(runs: dict[str, list[dict]], x: str):
    fig, ax = figure("Learning rate", x, "learning rate")
    for i, (name, lines) in enumerate(runs.items()):
        ax.plot(*series(lines, x, "lr"), color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=name)
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    legend(ax)
    return fig


def throughput_sheet(runs: dict[str, list[dict]], x: str):
    """Tokens per second from zero, with the median, which a slow moment does not move."""
    fig, ax = figure("Throughput", x, "tokens per second")
    for i, (name, lines) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        xs, ys = series(lines, x, "tokens_per_s")
        if ys:
            median = statistics.median(ys)
            prefix = "" if len(runs) == 1 else f"{name}: "
            ax.plot(xs, ys, color=colour, linewidth=1, alpha=0.6, label="measured" if len(runs) == 1 else None)
            ax.axhline(median, color=colour, linewidth=1.4, linestyle="--", label=f"{prefix}median {median:,.0f}")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(short_number)
    legend(ax, "lower right")
    return fig


SHEETS: dict[str, Callable] = {
    "loss.png": loss_sheet,
    "learning_rate.png": learning_rate_sheet,
    "throughput.png": throughput_sheet,
}


def curves(metrics: str | os.PathLike | Iterable[str | os.PathLike], out: str | os.PathLike, x: str = "step") -> None:
    """Draw every sheet into the directory `out`, for one metrics.jsonl or for several on the same sheets.

    x: "step", "tokens" or "seconds". Raises UserError where a file cannot be read or written, or has nothing to draw;
    the pictures that are there are then as they were.
    """
    paths = [Path(metrics)] if isinstance(metrics, (str, os.PathLike)) else [Path(path) for path in metrics]
    try:
        runs = dict(zip(run_names(paths), map(read_points, paths), strict=True))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; train.py writes metrics.jsonl") from error
    for path, lines in zip(paths, runs.values(), strict=True):
        check_points(path, lines, x)
    pictures = {name: png(sheet(runs, x)) for name, sheet in SHEETS.items()}
    for name, data in pictures.items():
        atomic_write(Path(out) / name, data)


def check_points(path: Path, lines: list[dict], x: str) -> None:
    """Raises UserError where a file holds no loss that can be drawn."""
    if any(series(lines, x, loss)[0] for loss in ("loss", "train_loss", "val_loss")):
        return
    if path.stat().st_size and not has_kind(path, "metrics"):
        raise UserError(f"{path} holds no metrics of a training run; name the metrics.jsonl in its checkpoints.path")
    raise UserError(f"{path} holds no loss at any {AXES[x]}; draw it once train.py has logged a step (log_interval)")


def picture_outputs(option: str, out: str | os.PathLike) -> list[Output]:
    """The pictures that `curves` writes into the directory `out`, which an option names."""
    return [Output(option, Path(out) / name, "picture") for name in SHEETS]


# ---- the command ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="plot.py", description="Draw the curves of one or more training runs.")
    parser.add_argument("metrics", nargs="+", help="metrics.jsonl, in a run's checkpoints.path")
    parser.add_argument("--out", default="img", help="directory of the pictures (default img)")
    parser.add_argument("--x", choices=list(AXES), default="step", help="what the curves are drawn against")
    arguments = parser.parse_args(argv)
    check_outputs(picture_outputs("--out", arguments.out), [Input("metrics", path) for path in arguments.metrics])
    curves(arguments.metrics, arguments.out, arguments.x)
    print(f"{', '.join(SHEETS)} are in {arguments.out}")


if __name__ == "__main__":
    run_cli(main)
