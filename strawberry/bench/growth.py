"""`bench.py growth`: tokens/s and memory of training as functions of the window T and of the width C."""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from strawberry.argument_parser import ArgumentParser
from strawberry.bench import child_process, hardware
from strawberry.bench.common import (
    check_results,
    format_command,
    format_table,
    list_spec_inputs,
    load_spec,
    make_line_style,
    parse_assignment,
    parse_count,
    parse_quantities,
    parse_quantity,
    qualify_key,
    refuse_repeats,
    split_spec,
    style_panel,
    write_benchmark_config,
)
from strawberry.common import UserError, atomic_write
from strawberry.device import choose_device
from strawberry.training import plot

DEFAULT_CONFIGS = (  # used if no configs are named: one shape with three ways to mix tokens
    "strawberry-large.json:n_layer=4,n_embd=512,n_qkv=512,n_head=8,r_layer=1,use_muon=false,window=256",
    "palm-aft.json:n_layer=4,n_embd=512,n_qkv=512,n_head=8,d_rank=null,use_muon=false",
    "palm-aft.json:n_layer=4,n_embd=512,n_qkv=512,n_head=8,d_rank=null,use_muon=false,attention_type=mha",
)


HEAD_DIM = 64  # channels of a head, for every width
AXES = {"T": "tokens in a window", "C": "channels (n_embd)"}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "bench.py growth",
        "Measure how tokens/s and memory of training change with the window T and with the width C; draw them.",
    )
    add = parser.add_argument
    add(
        "configs",
        nargs="*",
        default=DEFAULT_CONFIGS,
        help="config files, with changed keys; default: strawberry, attention-free mixing alone, full attention",
    )
    add("--contexts", default="256,1024,4096,16384,32768", help="windows T (default 256,1024,4096,16384,32768)")
    add(
        "--widths",
        default="64,256,512,1024,2048",
        help="widths C, multiples of 64, at windows of 1,024 tokens (default 64,256,512,1024,2048)",
    )
    add("--tokens", type=parse_quantity, default=32768, help="in a step, at least one window (default 32768)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of all")
    add(
        "--jobs",
        type=parse_count,
        default=1,
        help="configs that are prepared at once; they are measured one after the other (default 1)",
    )
    add("--out", default="img/growth", type=Path, help="directory of growth.md, .json and .png (default img/growth)")
    arguments = parser.parse_args(argv)
    arguments.contexts, arguments.widths = (
        list(parse_quantities(f"--{name}", text) if text else ())  # "": none
        for name, text in (("contexts", arguments.contexts), ("widths", arguments.widths))
    )
    if wrong := [width for width in arguments.widths if width % HEAD_DIM]:
        raise UserError(
            f"--widths: {wrong[0]} is no multiple of {HEAD_DIM}, the channels of a head; 1k is 1000, not 1024"
        )
    return arguments


def list_points(arguments: argparse.Namespace) -> list[dict]:
    """The points to measure: label of the config, axis, value on the axis, and run."""
    common, points = [parse_assignment(text) for text in arguments.set], []
    refuse_repeats(map(make_label, arguments.configs))
    for spec in arguments.configs:
        values = [("T", T) for T in arguments.contexts] + [("C", C) for C in arguments.widths]
        for axis, value in values:
            T = value if axis == "T" else min(1024, arguments.tokens)
            keys = [("block_size", T), ("batch_size", max(1, arguments.tokens // T))]
            if axis == "C":
                keys += [("n_embd", value), ("n_qkv", value), ("n_head", max(1, value // HEAD_DIM))]
            run = load_spec(spec, [*common, *((qualify_key(key), str(v)) for key, v in keys)], last=True)
            points.append({"config": make_label(spec), "axis": axis, "value": value, "run": run})
    return points


def make_label(spec: str) -> str:
    """A label that distinguishes a config from the others: the file's stem and the changes that are not sizes.

    >>> make_label("palm-aft.json:n_layer=4,attention_type=mha")
    'palm-aft attention_type=mha'
    """
    file, changes = split_spec(spec)
    sizes = ("n_layer=", "n_embd=", "n_qkv=", "n_head=", "d_rank=", "use_muon=", "window=")
    kept = [change for change in changes if change and not change.startswith(sizes)]
    return " ".join([Path(file).stem, *kept])


def run(argv: list[str]) -> None:
    """Measure how training's speed and memory change with window and width; draw them."""
    arguments = parse_arguments(argv)
    points = list_points(arguments)
    read = list_spec_inputs("configs", arguments.configs, (point["run"] for point in points))
    check_results("growth", arguments.out, argv, read)
    for first in range(0, len(points), arguments.jobs):
        group = points[first : first + arguments.jobs]
        with tempfile.TemporaryDirectory() as folder:
            files = [write_benchmark_config(Path(folder) / str(i), point["run"]) for i, point in enumerate(group)]
            found = child_process.run_in_turns("_speed", [[file] for file in files], group[0]["run"].device)
            for point, row in zip(group, found, strict=True):
                point |= row
                if "why" not in point:  # on a CPU, the peak resident memory of the process
                    point["memory"] = point["memory"] or point["resident"]
                print(format_point(point), flush=True)
    rows = [{key: value for key, value in point.items() if key != "run"} for point in points]
    write_growth(rows, arguments.out, format_command("python", "growth", argv))


def format_point(point: dict) -> str:
    if "why" in point:
        return f"{point['config']}, {point['axis']} {point['value']:,}: {point['why']}"
    memory = f", {point['memory'] / 2**30:,.2f} GiB" if point["memory"] else ""
    return f"{point['config']}, {point['axis']} {point['value']:,}: {point['tokens_per_s']:,.0f} tokens/s{memory}"


def write_growth(rows: list[dict], out: Path, command: str) -> None:
    """Write growth.json, growth.md and growth.png."""
    where = hardware.describe_device(choose_device("auto"))
    table = [[row["config"], row["axis"], f"{row['value']:,}",
              *((row["why"], "") if "why" in row else
                (f"{row['tokens_per_s']:,.0f}", f"{row['memory'] / 2**30:,.2f}" if row["memory"] else "–"))]
             for row in rows]  # fmt: skip
    text = format_table(["config", "axis", "value", "tokens/s", "memory, GiB"], table)
    atomic_write(out / "growth.md", f"{text}\n\n![growth](growth.png)\n\n{where}\n\n```\n{command}\n```\n".encode())
    atomic_write(out / "growth.json", json.dumps({"command": command, "rows": rows}, indent=1).encode())
    plot.save(draw_growth(rows, f"Training, {where}, torch {torch.__version__}"), out / "growth.png")
    print(f"\n{text}\n\nthe table and the picture are in {out}")


def draw_growth(rows: list[dict], title: str):
    """A figure: tokens/s above, memory below if it was measured; against the window on the left, the width on the
    right.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures = {"tokens_per_s": ("tokens/s", 1.0), "memory": ("memory (GiB)", 2.0**-30)}
    measures = {key: about for key, about in measures.items() if any(row.get(key) for row in rows)}
    fig = Figure(figsize=(10, 0.8 + 3.1 * max(len(measures), 1)), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(max(len(measures), 1), 2, sharex="col", squeeze=False)
    labels = list(dict.fromkeys(row["config"] for row in rows))
    for i, (key, (ylabel, scale)) in enumerate(measures.items()):
        line = panels[i]
        line[0].set_ylabel(ylabel, fontsize=11)
        for panel, (axis, name) in zip(line, AXES.items(), strict=True):
            for number, label in enumerate(labels):
                found = [(row["value"], row[key] * scale) for row in rows
                         if row["config"] == label and row["axis"] == axis and row.get(key)]  # fmt: skip
                if found:
                    panel.plot(*zip(*found, strict=True), **make_line_style(number), label=label)
            style_panel(panel, name if i + 1 == len(measures) else "")
            values = sorted({row["value"] for row in rows if row["axis"] == axis})
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.minorticks_off()
            highest = max((y for line in panel.lines for y in line.get_ydata()), default=1.0)
            panel.set_ylim(0, 1.06 * highest)  # the highest marker whole
    fig.suptitle(title, fontsize=12, x=0.01, ha="left")
    fig.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels), fontsize=9,
               frameon=False)  # fmt: skip
    return fig
