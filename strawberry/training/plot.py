"""Draw the curves of one or more runs from their metrics.jsonl.

    python -m strawberry.training.plot bin/ck/metrics.jsonl                # into img/
    python -m strawberry.training.plot a/metrics.jsonl b/metrics.jsonl --out img/compare --x tokens
    python -m strawberry.training.plot bin/ck/metrics.jsonl --out loss.pdf # only the loss; other names: all sheets

train.py calls `curves` at each evaluation. Only the functions that draw import matplotlib, so other code does not need
it. They use the Agg backend, which needs no display.

Index:  reading · style · the three sheets · the command
"""

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import contextlib
import io
import json
import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from strawberry.argument_parser import ArgumentParser
from strawberry.common import UserError, atomic_write, check_path_arguments, run_cli
from strawberry.outputs import Input, Output, check_outputs, has_kind
from strawberry.run_config import PICTURES, explain_picture_path

# Okabe and Ito's colours, which colour-blind readers can distinguish (https://jfly.uni-koeln.de/color/)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
AXES = {"step": "step", "tokens": "tokens", "seconds": "time in training steps (s)"}
POINTS = 2000  # maximum points of a curve: more than a picture of this width can show


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl; incomplete lines of a killed run are skipped."""
    return list(each_line(path))


def each_line(path: str | os.PathLike) -> Iterator[dict]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line


def read_points(path: str | os.PathLike) -> list[dict]:
    """read_metrics for a picture, with bounded memory: all evaluations, and every 2^i-th logged step with the smallest
    i that gives at most POINTS of them."""
    kept, every, n = [], 1, 0  # (index among the logged steps, line); the first and evaluations have 0 and are kept
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
    """The points of a curve: the lines with both keys. An evaluation has no `seconds`, so it uses the last line's x."""
    xs, ys, latest = [], [], None
    for line in lines:
        latest = line.get(x, latest)
        if latest is not None and line.get(y) is not None:
            xs.append(latest)
            ys.append(line[y])
    return xs, ys


def smooth(values: list[float]) -> list[float]:
    """Moving averages with Gaussian weights over about 8 % of the points. Near the start, where a loss falls fastest,
    the window is symmetric and narrow; near the end it extends only backwards."""
    import numpy as np

    ys, n = np.asarray(values, dtype=float), len(values)
    reach = min(n // 8, max(2, n // 25))  # points on each side
    weights = np.exp(-((np.arange(-reach, reach + 1) / max(reach, 1)) ** 2))
    means = []
    for i in range(n):
        back, ahead = min(i, reach), min(i, reach, n - 1 - i)
        w = weights[reach - back : reach + ahead + 1]
        means.append(float(w @ ys[i - back : i + ahead + 1] / w.sum()))
    return means


def run_names(paths: list[Path]) -> list[str]:
    """A name for each run: its model file's name, or the shortest end of its directory's path that is unique."""
    names = [read_model_name(path) for path in paths]
    if None not in names and len(set(names)) == len(names):
        return names
    for depth in range(1, max(len(path.resolve().parts) for path in paths)):
        names = ["/".join(path.resolve().parent.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_model_name(metrics: Path) -> str | None:
    """The name of the run's model, from its newest checkpoint or from the job's about.json; None if neither has it."""
    manifests = sorted(metrics.parent.glob("*step_*/manifest.json"), reverse=True)
    for path in (*manifests[:1], metrics.parent.parent / "about.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            about = json.loads(path.read_bytes())
            name = about["model"] if path.name == "about.json" else about["meta"]["run"]["model_path"]
            return re.sub(r"\.[A-Za-z]\w*$", "", re.split(r"[/\\]", name)[-1]) or None
    return None


WIDTH, HEIGHT = 6.4, 4.0  # size of a sheet without its legend, in inches
LONGEST = 34  # maximum characters of a name


def style_axes(ax, title: str, x: str, ylabel: str) -> None:
    """Apply the style that all sheets share."""
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, fontsize=12, loc="left")
    ax.set_xlabel(AXES[x], fontsize=11)
    ax.set_ylabel(ylabel, fontsize=11)
    ax.tick_params(labelsize=10, color="0.5", which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.5")
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10], integer=x != "seconds"))
    ax.xaxis.set_major_formatter(short_number)


def choose_style(number: int) -> dict:
    """Colour, marker and dashes of a run; the first 21 runs differ."""
    again = number // len(COLOURS)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[(number + again) % len(MARKERS)],
            "linestyle": ("-", "--", "-.")[again % 3], "markersize": 4}  # fmt: skip


def shorten_names(names: Iterable[str]) -> list[str]:
    """Names for a legend: shortened, with "$" escaped, which starts a formula in matplotlib, and without a leading "_",
    which matplotlib hides."""
    names = list(names)
    half = LONGEST // 2
    short = [name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}" for name in names]
    if len(set(short)) < len(names):  # they differ only in the middle
        short = names
    return [re.sub("^_", " _", name.replace("$", r"\$")) for name in short]


def draw_line(ax, xs: list[float], ys: list[float], **style) -> None:
    """Draw a curve. A single point gets a marker, since a line of one point is invisible."""
    if len(xs) == 1:
        style = {"marker": "o", "markersize": 5, **style}
    if xs:
        ax.plot(xs, ys, **style)


def short_number(value: float, position=None) -> str:
    """Format an axis number: 2000 → 2k, 12500000 → 12.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def png(fig) -> bytes:
    return render(fig, "png")


def render(fig, kind: str) -> bytes:
    """The figure as a file of that kind: png, svg or pdf."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font lacks a character of a name
        fig.savefig(data, format=kind)
    return data.getvalue()


def save(fig, path: Path) -> None:
    atomic_write(path, render(fig, path.suffix[1:].lower()))


def add_legend(ax) -> None:
    """Add a legend beside the curves, and widen the figure by it."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) < 2:
        return
    fig = ax.figure
    legend = ax.legend(handles, labels, fontsize=10, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1),
                       borderaxespad=0)  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        width = legend.get_window_extent(fig.canvas.get_renderer()).width / fig.dpi
    fig.set_figwidth(max(fig.get_figwidth(), WIDTH + width + 0.1))


def finish_axes(ax, x: str) -> None:
    """Set the limits for a single point, and add the legend; without curves, replace the axes by a message."""
    if not ax.lines:
        ax.set_axis_off()
        ax.set_title(ax.get_title(loc="left"), fontsize=12, loc="left")
        ax.text(0.5, 0.5, "nothing is logged yet", transform=ax.transAxes, ha="center", fontsize=11, color="0.4")
        return
    found = {value for line in ax.lines if line.get_transform() == ax.transData for value in line.get_xdata()}
    if len(found) == 1:
        (only,) = found
        ax.set_xlim(0, 2 * only) if only > 0 else ax.set_xlim(-1, 1)
    add_legend(ax)


class Sheet(NamedTuple):
    """One kind of plot. Called with {name: lines of metrics.jsonl}, it returns a figure."""

    title: str
    ylabel: str
    draw: Callable  # (axes, runs, x)

    def __call__(self, runs: dict[str, list[dict]], x: str):
        return draw_figure([self], runs, x)


def draw_figure(sheets: list[Sheet], runs: dict[str, list[dict]], x: str):
    """A figure of sheets, one below the other, for one or more runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(WIDTH, HEIGHT * len(sheets)), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    for ax, sheet in zip(fig.subplots(len(sheets), squeeze=False)[:, 0], sheets, strict=True):
        style_axes(ax, sheet.title, x, sheet.ylabel)
        sheet.draw(ax, dict(zip(shorten_names(runs), runs.values(), strict=True)), x)
        finish_axes(ax, x)
    return fig


def draw_loss(ax, runs: dict[str, list[dict]], x: str) -> None:
    """Draw loss against x, on a log scale."""
    if len(runs) == 1:
        (lines,) = runs.values()
        draw_loss_of_one(ax, lines, x)
    else:
        ax.set_title("with markers: validation; without: batch, smoothed", loc="right", fontsize=9, color="0.4")
        for i, (name, lines) in enumerate(runs.items()):
            draw_loss_of_many(ax, name, lines, x, choose_style(i))
    log_ticks(ax)


def draw_loss_of_one(ax, lines: list[dict], x: str) -> None:
    """Draw one run's batch losses, faint as logged and smoothed on top; both evaluations bold, the strict loss
    dotted."""
    xs, ys = series(lines, x, "loss")
    draw_line(ax, xs, ys, color=COLOURS[0], alpha=0.25, linewidth=0.7, label="_raw")
    draw_line(ax, xs, smooth(ys), color=COLOURS[0], alpha=0.8, linewidth=1.2, label="batch, smoothed")
    for y, colour, marker, label in (("train_loss", COLOURS[2], "s", "training"),
                                     ("val_loss", COLOURS[1], "o", "validation")):  # fmt: skip
        draw_line(ax, *series(lines, x, y), color=colour, marker=marker, markersize=4, label=label)
    draw_line(ax, *series(lines, x, "strict_loss"), **STRICT, color=COLOURS[1], label="validation, strict")


def draw_loss_of_many(ax, name: str, lines: list[dict], x: str, style: dict) -> None:
    """Draw one of several runs: validation loss bold, batch losses thin and smoothed, and faint as logged."""
    colour = style["color"]
    (xs, ys), evaluations = series(lines, x, "loss"), series(lines, x, "val_loss")
    draw_line(ax, xs, ys, color=colour, alpha=0.12, linewidth=0.6, label="_raw")
    label = "_batch" if evaluations[0] else name
    draw_line(ax, xs, smooth(ys), color=colour, alpha=0.6, linewidth=0.9, linestyle=style["linestyle"], label=label)
    draw_line(ax, *evaluations, **style, linewidth=1.6, label=name)
    draw_line(ax, *series(lines, x, "strict_loss"), **STRICT, color=colour, label=f"{name}, strict")


STRICT = {"linestyle": ":", "marker": "x", "markersize": 5}


def log_ticks(ax) -> None:
    """Set a log scale with ticks at round numbers, since the default ticks, powers of ten, would be one or none."""
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


def draw_learning_rate(ax, runs: dict[str, list[dict]], x: str) -> None:
    """Draw each run with a narrower line than the one before, since runs often have the same schedule."""
    for i, (name, lines) in enumerate(runs.items()):
        style, width = choose_style(i), 1.6 + min(len(runs) - 1 - i, 4)
        draw_line(ax, *series(lines, x, "lr"), color=style["color"], linestyle=style["linestyle"], linewidth=width,
                  label=name)  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def draw_throughput(ax, runs: dict[str, list[dict]], x: str) -> None:
    """Draw tokens per second from zero, with the median, which short slowdowns do not affect."""
    for i, (name, lines) in enumerate(runs.items()):
        colour, single = choose_style(i)["color"], len(runs) == 1
        xs, ys = series(lines, x, "tokens_per_s")
        draw_line(ax, xs, ys, color=colour, linewidth=1, alpha=0.6, label="measured" if single else "_measured")
        if ys:
            median = statistics.median(ys)
            label = f"{'' if single else f'{name}: '}median {median:,.0f}"
            ax.axhline(median, color=colour, linewidth=1.4, linestyle="--", label=label)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(short_number)


SHEETS = {  # file name in a directory → sheet
    "loss.png": Sheet("Loss", "cross-entropy (nats per token)", draw_loss),
    "learning_rate.png": Sheet("Learning rate", "learning rate", draw_learning_rate),
    "throughput.png": Sheet("Throughput", "tokens per second", draw_throughput),
}


def list_pictures(out: str | os.PathLike) -> dict[Path, list[Sheet]]:
    """The files of `out`, and the sheets in each. A directory has a PNG for each sheet; a .png, .svg or .pdf file has
    the sheet of its name (loss.svg), otherwise all sheets."""
    out = Path(out)
    if out.suffix.lower() not in PICTURES or out.is_dir():
        return {out / name: [sheet] for name, sheet in SHEETS.items()}
    named = SHEETS.get(f"{out.stem}.png")
    return {out: [named] if named else list(SHEETS.values())}


def curves(metrics: str | os.PathLike | Iterable[str | os.PathLike], out: str | os.PathLike, x: str = "step") -> None:
    """Draw the sheets of `out` (see `list_pictures`), for one metrics.jsonl or for several on the same sheets.

    x: "step", "tokens" or "seconds". Raises UserError if a file cannot be read or written, or has nothing to draw. If a
    metrics file cannot be read or drawn, existing pictures are unchanged.
    """
    paths = [Path(metrics)] if isinstance(metrics, (str, os.PathLike)) else [Path(path) for path in metrics]
    paths = list({os.path.realpath(path): path for path in paths}.values())  # a run that is named twice is drawn once
    try:
        runs = dict(zip(run_names(paths), map(read_points, paths), strict=True))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; train.py writes metrics.jsonl") from error
    for path, lines in zip(paths, runs.values(), strict=True):
        check_points(path, lines, x)
    figures = {path: draw_figure(sheets, runs, x) for path, sheets in list_pictures(out).items()}
    for path, figure in figures.items():
        save(figure, path)


def check_points(path: Path, lines: list[dict], x: str) -> None:
    """Raises UserError if a file has no loss that can be drawn."""
    if any(series(lines, x, loss)[0] for loss in ("loss", "train_loss", "val_loss")):
        return
    if path.stat().st_size and not has_kind(path, "metrics"):
        raise UserError(f"{path} has no metrics of a training run; name the metrics.jsonl in its checkpoints.path")
    raise UserError(f"{path} holds no loss at any {AXES[x]}; draw it once train.py has logged a step (log_interval)")


def picture_outputs(option: str, out: str | os.PathLike) -> list[Output]:
    """The pictures that `curves` writes to `out`, the value of an option."""
    return [Output(option, path, "picture") for path in list_pictures(out)]


def main(argv: list[str]) -> None:
    parser = ArgumentParser("-m strawberry.training.plot", "Draw the curves of one or more training runs.")
    parser.add_argument("metrics", nargs="+", help="metrics.jsonl of a run, or the run's checkpoints.path")
    parser.add_argument(
        "--out",
        default="img",
        help="directory of the pictures, as PNG (default img), "
        "or a .png, .svg or .pdf file: loss.pdf has the loss, any other name all sheets",
    )
    parser.add_argument("--x", choices=list(AXES), default="step", help="what the curves are drawn against")
    arguments = parser.parse_args(argv)
    check_path_arguments(arguments, "metrics", "out")
    if problem := explain_picture_path(arguments.out):
        raise UserError(f"--out {arguments.out}: {problem}")
    metrics = [os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path for path in arguments.metrics]
    check_outputs(picture_outputs("--out", arguments.out), [Input("metrics", path) for path in metrics])
    curves(metrics, arguments.out, arguments.x)
    print("\n".join(map(str, list_pictures(arguments.out))))


if __name__ == "__main__":
    run_cli(main)
