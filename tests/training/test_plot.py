"""Plots: what is on the sheets, and what they survive."""

import json

import numpy as np
import pytest
from machine import require_module

from strawberry.common import UserError
from strawberry.training import plot

require_module("matplotlib", whole_file=True)


def write_run(path, steps=40, slope=1.0, strict=False):
    """A metrics.jsonl as training writes it."""
    lines = []
    for step in range(1, steps + 1):
        loss = 2 + 6 / (1 + slope * step)
        common = {"step": step, "tokens": 100 * step}
        rates = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 900 + step, "seconds": step / 9}
        lines.append(common | {"loss": loss} | rates)
        if step % 10 == 0:
            both = {"train_loss": loss, "val_loss": loss + 0.1, "train_bpb": loss / 3, "val_bpb": loss / 3}
            lines.append(common | both | ({"strict_loss": loss + 0.3} if strict else {}))
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sheet(name, *paths, x="step"):
    """The axes of one sheet."""
    runs = dict(zip(plot.run_names(list(paths)), map(plot.read_metrics, paths), strict=True))
    return plot.SHEETS[name](runs, x).axes[0]


def curve(ax, label):
    return next(line for line in ax.lines if line.get_label() == label).get_xydata().tolist()


@pytest.mark.slow
def test_three_pictures_are_written(tmp_path):
    plot.curves(write_run(tmp_path / "a" / "metrics.jsonl"), tmp_path / "img")
    assert sorted(path.name for path in (tmp_path / "img").iterdir()) == sorted(plot.SHEETS)
    for path in (tmp_path / "img").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_the_loss_sheet_has_every_curve_and_units(tmp_path):
    ax = sheet("loss.png", write_run(tmp_path / "a" / "metrics.jsonl", strict=True))
    labels = ["batch, smoothed", "training", "validation", "validation, strict"]
    assert [line.get_label() for line in ax.lines] == ["_raw", *labels]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == labels
    assert len(curve(ax, "_raw")) == 40 and [x for x, _ in curve(ax, "validation")] == [10, 20, 30, 40]
    assert curve(ax, "validation")[0][1] == pytest.approx(2.1 + 6 / 11)
    assert ax.get_yscale() == "log" and "nats" in ax.get_ylabel() and ax.get_xlabel() == "step"
    assert ax.get_legend() is not None and not ax.spines["top"].get_visible()


def test_runs_are_overlaid_under_names_that_tell_them_apart(tmp_path):
    paths = [write_run(tmp_path / name / "metrics.jsonl", slope=slope) for name, slope in (("a", 1), ("b", 0.5))]
    ax = sheet("loss.png", *paths, x="tokens")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert curve(ax, "b")[0][0] == 1000 and ax.get_xlabel() == "tokens"
    assert len({line.get_color() for line in ax.lines}) == 2


def test_a_run_that_is_named_twice_is_drawn_once(tmp_path):
    path = write_run(tmp_path / "a" / "metrics.jsonl")
    for name, paths in (("once.svg", [path]), ("twice.svg", [path, tmp_path / "a" / ".." / "a" / "metrics.jsonl"])):
        plot.curves(paths, tmp_path / name)
    assert (tmp_path / "twice.svg").read_text().count("<path") == (tmp_path / "once.svg").read_text().count("<path")


def test_evaluations_are_drawn_at_the_seconds_of_the_line_before(tmp_path):
    ax = sheet("loss.png", write_run(tmp_path / "a" / "metrics.jsonl"), x="seconds")
    assert curve(ax, "validation")[0][0] == pytest.approx(10 / 9)


def test_throughput_has_its_median_and_starts_at_zero(tmp_path):
    ax = sheet("throughput.png", write_run(tmp_path / "a" / "metrics.jsonl"))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["measured", "median 920"]
    assert ax.get_ylim()[0] == 0


def test_names_are_as_long_as_they_must_be(tmp_path):
    a, b = (tmp_path / name / "ck" / "metrics.jsonl" for name in ("one", "two"))
    assert plot.run_names([a, b]) == ["one/ck", "two/ck"] and plot.run_names([a]) == ["ck"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ['{"step": 1, "loss": 3.0}\n', '{"step": 1, "val_loss": 3.0}\n{"step": 2, "lo', '[]\n7\n{"step":1,"loss":2}'],
)
def test_short_and_broken_files_are_drawn_as_far_as_they_go(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    plot.curves(path, tmp_path)
    assert (tmp_path / "loss.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("text,message", [
    ("", "holds no loss at any step"),
    ('{"step": 1, "loss": null}\n{"step": 2, "lo', "holds no loss at any step"),
    ('{"step": 1, "lr": 0.1}\n', "holds no loss at any step"),
    ("[]\n7\n", "has no metrics of a training run"),
    ("Once upon a time,\nin a book.\n", "has no metrics of a training run"),
    ('{"text": "a document"}\n', "has no metrics of a training run"),
])  # fmt: skip
def test_files_without_metrics_leave_the_last_pictures_unchanged(tmp_path, text, message):
    good, other = write_run(tmp_path / "a" / "metrics.jsonl"), tmp_path / "other.txt"
    other.write_text(text)
    plot.main([str(good), "--out", str(tmp_path / "img")])
    before = {path.name: path.read_bytes() for path in (tmp_path / "img").iterdir()}
    plot.main([str(good.parent), "--out", str(tmp_path / "same")])  # a directory stands for its metrics.jsonl
    assert {path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()} == before
    for paths in ([other], [good, other]):
        with pytest.raises(UserError, match=f"other.txt {message}"):
            plot.main([*map(str, paths), "--out", str(tmp_path / "img")])
    assert {path.name: path.read_bytes() for path in (tmp_path / "img").iterdir()} == before


def test_metrics_without_seconds_have_no_axis_of_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "val_loss": 3.0}\n')
    with pytest.raises(UserError, match="holds no loss at any time in training steps"):
        plot.main([str(path), "--out", str(tmp_path / "img"), "--x", "seconds"])


@pytest.mark.slow
def test_a_figure_that_fails_leaves_all_of_the_last_pictures_unchanged(tmp_path, monkeypatch):
    path = write_run(tmp_path / "a" / "metrics.jsonl")
    plot.curves(path, tmp_path / "img")
    before = {path.name: path.read_bytes() for path in (tmp_path / "img").iterdir()}
    write_run(path, slope=3)
    broken = plot.SHEETS["throughput.png"]._replace(draw=lambda ax, runs, x: 1 / 0)
    monkeypatch.setitem(plot.SHEETS, "throughput.png", broken)
    with pytest.raises(ZeroDivisionError):
        plot.curves(path, tmp_path / "img")
    assert {path.name: path.read_bytes() for path in (tmp_path / "img").iterdir()} == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        plot.main([str(tmp_path / "none.jsonl")])


# ---- smoothing -----------------------------------------------------------------------------------------------------


def noisy(n, seed=0):
    """A falling loss, and what batches of it look like."""
    truth = 2 + 6 * np.exp(-np.arange(n) / (n / 8))
    return truth, truth + np.random.default_rng(seed).normal(0, 0.2, n)


@pytest.mark.parametrize("n", [21, 100, 2000])
def test_the_smoothed_batch_loss_is_nearer_to_the_true_mean(n):
    flat = slice(n // 3, None)  # where it falls slowly
    roughness, distance = [], []
    for seed in range(20):
        truth, ys = noisy(n, seed)
        smoothed = np.array(plot.smooth(list(ys)))
        assert len(smoothed) == n and smoothed[0] == pytest.approx(ys[0])
        roughness.append(np.abs(np.diff(smoothed[flat])).mean() / np.abs(np.diff(ys[flat])).mean())
        distance.append(np.abs(smoothed - truth)[flat].mean() / np.abs(ys - truth)[flat].mean())
    assert np.mean(roughness) < 0.5 and np.mean(distance) < 0.75


def test_smoothing_keeps_a_line_and_short_runs_as_they_are():
    line = [5 - 0.01 * i for i in range(300)]
    smoothed = plot.smooth(line)
    assert smoothed[: 300 - 12] == pytest.approx(line[: 300 - 12])  # at the end it reaches back only
    assert plot.smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0] and plot.smooth([]) == []


def test_the_raw_loss_is_faint_and_behind(tmp_path):
    raw, smoothed = sheet("loss.png", write_run(tmp_path / "a" / "metrics.jsonl")).lines[:2]
    assert raw.get_label() == "_raw" and raw.get_alpha() < 0.5 < smoothed.get_alpha()
    assert raw.get_linewidth() < smoothed.get_linewidth()


# ---- what is hardly there ------------------------------------------------------------------------------------------


def ink(fig, ax) -> int:
    """Pixels of the axes' inside that are not white or grey."""
    pixels = inside(fig, ax)
    return int((np.ptp(pixels, axis=2) > 20).sum())


def inside(fig, ax):
    """The pixels inside of the axes."""
    fig.canvas.draw()
    pixels = np.asarray(fig.canvas.buffer_rgba())[..., :3].astype(int)
    box = ax.get_window_extent()
    height = pixels.shape[0]
    return pixels[round(height - box.y1) : round(height - box.y0), round(box.x0) : round(box.x1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", plot.SHEETS)
@pytest.mark.parametrize("runs", [1, 3])
def test_a_single_point_is_visible_inside_the_axes(tmp_path, name, runs):
    paths = [write_run(tmp_path / f"r{i}" / "metrics.jsonl", steps=1, slope=i + 1) for i in range(runs)]
    ax = sheet(name, *paths)
    assert ink(ax.figure, ax) > 60 * runs
    assert ax.get_xlim() == (0, 2)
    ticks = [label.get_text() for label in ax.get_xticklabels()]
    assert ticks == ["0", "1", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", plot.SHEETS)
@pytest.mark.parametrize("lines", [[], [{"step": 3, "loss": None}]])
def test_a_run_without_logged_steps_has_a_text_instead_of_axes(tmp_path, name, lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ax = sheet(name, path)
    ax.figure.canvas.draw()
    assert not ax.axison and [text.get_text() for text in ax.texts] == ["nothing is logged yet"]
    assert ax.get_title(loc="left")


# ---- legends and names ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", plot.SHEETS)
@pytest.mark.parametrize("length", [3, 60])
def test_the_legend_is_beside_the_curves_and_takes_none_of_their_room(tmp_path, name, length):
    paths = [write_run(tmp_path / (f"{i}" * length) / "metrics.jsonl", slope=i + 1, strict=True) for i in range(5)]
    alone = sheet("learning_rate.png", paths[0])
    alone.figure.canvas.draw()
    ax = sheet(name, *paths)
    ax.figure.canvas.draw()
    box, legend, whole = ax.get_window_extent(), ax.get_legend().get_window_extent(), ax.figure.bbox
    assert legend.x0 > box.x1 and legend.x1 <= whole.x1 and legend.y0 >= 0 and legend.y1 <= whole.y1
    assert box.width > 0.9 * alone.get_window_extent().width


def save_manifest(path, model_path):
    folder = path.parent / "step_00000010"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"meta": {"run": {"model_path": model_path}}}))


def test_runs_are_named_after_their_models(tmp_path):
    jobs = [write_run(make(tmp_path / f"ftjob-{i:024x}") / "checkpoints" / "metrics.jsonl") for i in range(4)]
    assert plot.run_names(jobs[:2]) == [f"ftjob-{i:024x}/checkpoints" for i in range(2)]
    save_manifest(jobs[0], "bin/v0.1/air.strawberry")
    save_manifest(jobs[1], "C:\\bin\\tiny-v0.2.tinystar")
    save_manifest(jobs[2], "bin/air.strawberry")
    (jobs[3].parent.parent / "about.json").write_text('{"model": "ft-tiny-0a1b2c3d.strawberry"}')
    names = ["air", "tiny-v0.2", "ft-tiny-0a1b2c3d"]
    assert plot.run_names([jobs[0], jobs[1], jobs[3]]) == names
    assert plot.run_names([jobs[0], jobs[2]]) == [f"ftjob-{i:024x}/checkpoints" for i in (0, 2)]  # both are air


def make(folder):
    folder.mkdir()
    return folder


def test_shortened_names_keep_their_signs_and_differ(tmp_path):
    long = [f"the same beginning of both, {i} and the same end of both of them" for i in range(2)]
    names = ["_run", "$a$", "x" * 80, *long]
    ax = plot.SHEETS["loss.png"](dict.fromkeys(names, [{"step": 1, "val_loss": 2.0}]), "step").axes[0]
    ax.figure.canvas.draw()
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert shown == [" _run", r"\$a\$", "x" * 80, *long]
    assert len(plot.shorten_names(["x" * 80])[0]) == plot.LONGEST
    assert plot.shorten_names(["air", "y" * 35]) == ["air", "y" * 16 + "…" + "y" * 17]


def test_many_runs_are_distinguishable():
    styles = [tuple(sorted(plot.choose_style(i).items())) for i in range(21)]
    assert len(set(styles)) == 21


# ---- the files -----------------------------------------------------------------------------------------------------

BEGINS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", BEGINS)
def test_the_extension_chooses_the_file_format(tmp_path, suffix, capsys):
    run = write_run(tmp_path / "a" / "metrics.jsonl")
    for name, sheets in ((f"loss{suffix}", 1), (f"ALL{suffix.upper()}", 3)):
        out = tmp_path / "new" / name
        plot.main([str(run), "--out", str(out)])
        assert capsys.readouterr().out == f"{out}\n" and out.read_bytes().startswith(BEGINS[suffix])
        (drawn,) = plot.list_pictures(out).values()
        assert len(drawn) == sheets
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        [f"loss{suffix}", f"ALL{suffix.upper()}"])  # fmt: skip


def test_one_file_has_all_sheets_one_below_the_other(tmp_path):
    run = write_run(tmp_path / "a" / "metrics.jsonl")
    (sheets,) = plot.list_pictures("all.svg").values()
    axes = plot.draw_figure(sheets, {"a": plot.read_metrics(run)}, "step").axes
    assert [ax.get_title(loc="left") for ax in axes] == ["Loss", "Learning rate", "Throughput"]


def test_other_kinds_of_pictures_are_refused_and_directories_with_dots_are_not(tmp_path):
    run = write_run(tmp_path / "a" / "metrics.jsonl")
    with pytest.raises(UserError, match=r"--out x\.jpg: cannot be drawn as \.jpg; .* \.png, \.svg or \.pdf"):
        plot.main([str(run), "--out", "x.jpg"])
    with pytest.raises(UserError, match="control character"):
        plot.main([str(run), "--out", "a\tb"])
    (tmp_path / "folder.png").mkdir()
    for folder in ("v0.1", "folder.png"):
        assert list(plot.list_pictures(tmp_path / folder)) == [tmp_path / folder / name for name in plot.SHEETS]


@pytest.mark.parametrize("value,text", [(0, "0"), (950, "950"), (2000, "2k"), (12_500_000, "12.5M"), (3e9, "3B")])
def test_numbers_on_axes_are_abbreviated(value, text):
    assert plot.short_number(value) == text


def test_a_long_run_is_drawn_from_few_points_and_all_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "POINTS", 10)
    lines = [{"step": n, "loss": 1.0} for n in range(1, 101)]
    lines[50:50] = [{"step": 50, "val_loss": 1.0}]
    lines.append({"step": 100, "val_loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    for end in (3, 10, 11, 52, 102):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines[:end]))
        got = plot.read_points(path)
        logged = [line["step"] for line in got if "loss" in line]
        assert len(logged) <= 11 and len(set(np.diff(logged))) <= 1 and logged[0] == 1
        assert len(logged) == min(end, 10) or len(logged) >= 5
        assert [line for line in got if "loss" not in line] == [line for line in lines[:end] if "loss" not in line]
    assert len(plot.read_metrics(path)) == 102
