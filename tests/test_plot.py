"""Plots: what is on the sheets, and what they survive."""

import json

import numpy as np
import pytest
from machine import require_module

import plot
from options import UserError

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


def test_three_pictures_are_written(tmp_path):
    plot.curves(write_run(tmp_path / "a" / "metrics.jsonl"), tmp_path / "img")
    assert sorted(path.name for path in (tmp_path / "img").iterdir()) == sorted(plot.SHEETS)
    for path in (tmp_path / "img").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_the_loss_sheet_has_every_curve_and_units(tmp_path):
    ax = sheet("loss.png", write_run(tmp_path / "a" / "metrics.jsonl", strict=True))
    assert [line.get_label() for line in ax.lines] == ["batch", "training", "validation", "validation, strict"]
    assert len(curve(ax, "batch")) == 40 and [x for x, _ in curve(ax, "validation")] == [10, 20, 30, 40]
    assert curve(ax, "validation")[0][1] == pytest.approx(2.1 + 6 / 11)
    assert ax.get_yscale() == "log" and "nats" in ax.get_ylabel() and ax.get_xlabel() == "step"
    assert ax.get_legend() is not None and not ax.spines["top"].get_visible()


def test_runs_are_overlaid_under_names_that_tell_them_apart(tmp_path):
    paths = [write_run(tmp_path / name / "metrics.jsonl", slope=slope) for name, slope in (("a", 1), ("b", 0.5))]
    ax = sheet("loss.png", *paths, x="tokens")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a, validation", "b, validation"]
    assert curve(ax, "b, validation")[0][0] == 1000 and ax.get_xlabel() == "tokens"
    assert len({line.get_color() for line in ax.lines}) == 2


def test_evaluations_stand_at_the_seconds_of_the_line_before(tmp_path):
    ax = sheet("loss.png", write_run(tmp_path / "a" / "metrics.jsonl"), x="seconds")
    assert curve(ax, "validation")[0][0] == pytest.approx(10 / 9)


def test_throughput_has_its_median_and_starts_at_zero(tmp_path):
    ax = sheet("throughput.png", write_run(tmp_path / "a" / "metrics.jsonl"))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["measured", "median 920"]
    assert ax.get_ylim()[0] == 0


def test_names_are_as_long_as_they_must_be(tmp_path):
    a, b = (tmp_path / name / "ck" / "metrics.jsonl" for name in ("one", "two"))
    assert plot.run_names([a, b]) == ["one/ck", "two/ck"] and plot.run_names([a]) == ["ck"]


@pytest.mark.parametrize(
    "text",
    ['{"step": 1, "loss": 3.0}\n', '{"step": 1, "val_loss": 3.0}\n{"step": 2, "lo', '[]\n7\n{"step":1,"loss":2}'],
)
def test_short_and_broken_files_are_drawn_as_far_as_they_go(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    plot.curves(path, tmp_path)
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("text,told", [
    ("", "holds no loss at any step"),
    ('{"step": 1, "loss": null}\n{"step": 2, "lo', "holds no loss at any step"),
    ('{"step": 1, "lr": 0.1}\n', "holds no loss at any step"),
    ("[]\n7\n", "holds no metrics of a training run"),
    ("Once upon a time,\nin a book.\n", "holds no metrics of a training run"),
    ('{"text": "a document"}\n', "holds no metrics of a training run"),
])  # fmt: skip
def test_what_has_nothing_to_draw_leaves_the_last_pictures(tmp_path, text, told):
    good, other = write_run(tmp_path / "a" / "metrics.jsonl"), tmp_path / "other.txt"
    other.write_text(text)
    plot.main([str(good), "--out", str(tmp_path / "img")])
    before = {path.name: path.read_bytes() for path in (tmp_path / "img").iterdir()}
    for paths in ([other], [good, other]):
        with pytest.raises(UserError, match=f"other.txt {told}"):
            plot.main([*map(str, paths), "--out", str(tmp_path / "img")])
    assert {path.name: path.read_bytes() for path in (tmp_path / "img").iterdir()} == before


def test_seconds_that_no_line_has_are_no_axis(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "val_loss": 3.0}\n')
    with pytest.raises(UserError, match="holds no loss at any time in training steps"):
        plot.main([str(path), "--out", str(tmp_path / "img"), "--x", "seconds"])


def test_a_sheet_that_fails_leaves_all_of_the_last_pictures(tmp_path, monkeypatch):
    path = write_run(tmp_path / "a" / "metrics.jsonl")
    plot.curves(path, tmp_path / "img")
    before = {path.name: path.read_bytes() for path in (tmp_path / "img").iterdir()}
    write_run(path, slope=3)
    monkeypatch.setitem(plot.SHEETS, "throughput.png", lambda runs, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plot.curves(path, tmp_path / "img")
    assert {path.name: path.read_bytes() for path in (tmp_path / "img").iterdir()} == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        plot.main([str(tmp_path / "none.jsonl")])


@pytest.mark.parametrize("value,text", [(0, "0"), (950, "950"), (2000, "2k"), (12_500_000, "12.5M"), (3e9, "3B")])
def test_numbers_are_short(value, text):
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
