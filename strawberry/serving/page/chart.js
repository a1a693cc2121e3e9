// Curves of runs, drawn by uPlot: metrics and axes to choose from, smoothing, zoom, a legend with the values at the
// cursor.

import { button, el, say, size } from "./dom.js";

/* global uPlot */

const ROUTER = "router";
/** Metrics by name: the key of a logged step, that of an evaluation, both or either. */
export const METRICS = {
  loss: { label: "loss", axis: "nats per token", logged: "loss", evaluated: "val_loss", log: true },
  val_loss: { label: "validation loss", axis: "nats per token", evaluated: "val_loss", log: true },
  train_loss: { label: "training loss, evaluated", axis: "nats per token", evaluated: "train_loss", log: true },
  val_bpb: { label: "validation bits per byte", axis: "bits per byte", evaluated: "val_bpb", log: true },
  train_bpb: { label: "training bits per byte", axis: "bits per byte", evaluated: "train_bpb", log: true },
  lr: { label: "learning rate", axis: "learning rate", logged: "lr" },
  grad_norm: { label: "gradient norm", axis: "norm before clipping", logged: "grad_norm", log: true },
  tokens_per_s: { label: "throughput", axis: "tokens per second", logged: "tokens_per_s" },
  routers: { label: "router load", axis: "largest share × experts; 1 is even", logged: ROUTER }
};
export const AXES = { step: "step", tokens: "tokens", flops: "FLOP", seconds: "seconds in steps" };
const COLOURS = 8;
const WHOLE = Array.from({ length: 18 }, (_, e) => [1, 2, 5].map(f => f * 10 ** e)).flat(); // distances of ticks

/** The points of a curve: [xs, ys]. An evaluation has no seconds, so it has those of the line before. */
export function points(lines, x, y, flopsPerToken) {
  const xs = [],
    ys = [];
  let latest = null;
  for (const line of lines) {
    const at = x === "flops" ? (line.tokens == null || !flopsPerToken ? null : line.tokens * flopsPerToken) : line[x];
    latest = at ?? latest;
    const value = y === ROUTER ? imbalance(line.routers) : line[y];
    if (latest == null || value == null) continue;
    if (xs.length && latest <= xs.at(-1)) {
      // a rollback goes back: what was done again counts
      while (xs.length && xs.at(-1) >= latest) {
        xs.pop();
        ys.pop();
      }
    }
    xs.push(latest);
    ys.push(value);
  }
  return [xs, ys];
}

/** Of all routers the largest share of the tokens that one expert gets, times the experts. */
const imbalance = routers =>
  routers ? Math.max(...Object.values(routers).map(shares => Math.max(...shares) * shares.length)) : null;

/** Exponential moving averages, of which the first is no more weighted than the others (as Adam's). */
export function smooth(values, strength) {
  if (!strength) return values;
  let sum = 0,
    weight = 0;
  return values.map(value => {
    sum = strength * sum + (1 - strength) * value;
    weight = strength * weight + (1 - strength);
    return sum / weight;
  });
}

/** Round numbers between low and high. */
function ticks(low, high, most = 6) {
  const step =
    [1, 2, 2.5, 5, 10]
      .map(f => f * 10 ** Math.floor(Math.log10((high - low) / most)))
      .find(step => (high - low) / step <= most) ?? high - low;
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

/** Ticks of a logarithmic axis: round numbers where it spans less than a factor of 20, else 1, 2, 5, 10, … */
function logTicks(low, high) {
  if (high / low < 20) return ticks(low, high);
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
    for (const f of high / low < 1e4 ? [1, 2, 5] : [1])
      if (f * 10 ** e >= low && f * 10 ** e <= high) found.push(f * 10 ** e);
  }
  return found;
}

const tickText = n =>
  n == null
    ? ""
    : Math.abs(n) >= 1000
      ? size(n)
      : n === 0
        ? "0"
        : Math.abs(n) < 1e-3
          ? n.toExponential(0)
          : String(Number(n.toPrecision(6)));
const shown = n =>
  n == null
    ? ""
    : Math.abs(n) >= 1e4
      ? size(n)
      : Math.abs(n) < 1e-3 && n
        ? n.toExponential(2)
        : String(Number(n.toPrecision(4)));

/** A chart with its controls in `root`. draw(runs) shows [{id, name, lines, colour, flopsPerToken}]. */
export class Chart {
  constructor(root, stored = "chart") {
    this.stored = stored;
    this.options = {
      metric: "loss",
      x: "step",
      logX: false,
      logY: null,
      smoothing: 0.6,
      ...JSON.parse(sessionStorage.getItem(stored) ?? "{}")
    };
    this.hidden = new Set();
    this.runs = [];
    const choice = (label, name, choices) => {
      const select = el(
        "select",
        { onchange: () => this.set(name, select.value) },
        Object.entries(choices).map(([value, text]) => new Option(text, value, false, value === this.options[name]))
      );
      return el("label", { class: "inline" }, el("span", {}, label), select);
    };
    this.logX = el("input", {
      type: "checkbox",
      checked: this.options.logX,
      onchange: () => this.set("logX", this.logX.checked)
    });
    this.logY = el("input", { type: "checkbox", onchange: () => this.set("logY", this.logY.checked) });
    this.smoothing = el("input", {
      type: "range",
      min: 0,
      max: 0.98,
      step: 0.02,
      value: this.options.smoothing,
      oninput: () => this.set("smoothing", Number(this.smoothing.value))
    });
    this.reset = button("Whole range", () => this.redraw(true), { class: "small" });
    this.reset.hidden = true;
    this.plot = el("div", { class: "plot" });
    this.note = el("p", { class: "hint plot-note" });
    this.legend = el("ul", { class: "legend", "aria-label": "Curves; press one to hide it" });
    const labels = Object.fromEntries(Object.entries(METRICS).map(([name, metric]) => [name, metric.label]));
    root.append(
      el(
        "div",
        { class: "chart-controls" },
        choice("Show", "metric", labels),
        choice("against", "x", AXES),
        el("label", { class: "check" }, this.logY, "log y"),
        el("label", { class: "check" }, this.logX, "log x"),
        el("label", { class: "inline" }, el("span", {}, "smooth"), this.smoothing),
        this.reset
      ),
      this.plot,
      this.note,
      this.legend
    );
    this.root = root;
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.onScheme = () => this.redraw();
    this.scheme.addEventListener("change", this.onScheme);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.plot);
  }

  set(name, value) {
    if (name === "metric") this.options.logY = null; // its own default
    this.options[name] = value;
    sessionStorage.setItem(this.stored, JSON.stringify(this.options));
    this.redraw(name !== "smoothing");
  }

  leave() {
    this.scheme.removeEventListener("change", this.onScheme);
    this.observer.disconnect();
    this.u?.destroy();
  }

  draw(runs) {
    this.runs = runs;
    this.redraw();
  }

  /** The series: for each run what was logged, faint and smoothed, and what was evaluated. */
  series() {
    const { metric, x, smoothing } = this.options,
      { logged, evaluated } = METRICS[metric],
      found = [];
    for (const run of this.runs) {
      if (this.hidden.has(run.id)) continue;
      if (logged) {
        const [xs, ys] = points(run.lines, x, logged, run.flopsPerToken);
        const strength = xs.length > 8 && logged !== "lr" ? smoothing : 0;
        if (strength && xs.length) found.push({ run, xs, ys, width: 1, quiet: true });
        if (xs.length)
          found.push({ run, xs, ys: smooth(ys, strength), width: evaluated ? 1.25 : 1.75, dots: xs.length < 3 });
      }
      if (evaluated) {
        const [xs, ys] = points(run.lines, x, evaluated, run.flopsPerToken);
        if (xs.length) found.push({ run, xs, ys, width: 2, dots: xs.length < 100, main: true });
      }
    }
    return found;
  }

  redraw(whole = false) {
    const series = this.series(),
      log = this.options.logY ?? METRICS[this.options.metric].log ?? false;
    this.logY.checked = log;
    this.smoothing.disabled = !METRICS[this.options.metric].logged;
    const shape = JSON.stringify([
      this.options.metric,
      this.options.x,
      this.options.logX,
      log,
      this.scheme.matches,
      series.map(({ run, quiet, main }) => [run.id, run.colour, quiet, main])
    ]);
    const tables = series.map(({ xs, ys }) => (this.options.logX ? positive(xs, ys) : [xs, ys]));
    const data = tables.length ? uPlot.join(tables) : [[]];
    const none = !this.runs.length
      ? "Choose runs in the table to compare their curves."
      : "Nothing of this is logged yet." +
        (this.options.x === "flops" && this.runs.some(run => !run.flopsPerToken)
          ? " A run that an earlier version started does not know its FLOPs."
          : "");
    say(this.note, series.length ? "" : none);
    this.plot.hidden = !series.length;
    if (!series.length) {
      this.u?.destroy();
      this.u = this.shape = null;
    } else if (this.u && this.shape === shape) {
      this.u.setData(data, whole || !this.isZoomed());
    } else {
      const zoom =
        !whole && this.u && this.shape && this.isZoomed()
          ? { min: this.u.scales.x.min, max: this.u.scales.x.max }
          : null;
      this.u?.destroy();
      this.u = new uPlot(this.settings(series, log), data, this.plot);
      this.shape = shape;
      if (zoom) this.u.setScale("x", zoom);
    }
    this.reset.hidden = !this.u || !this.isZoomed();
    this.drawLegend(series);
  }

  isZoomed() {
    const xs = this.u?.data[0] ?? [];
    return xs.length > 1 && (this.u.scales.x.min > xs[0] * 1.0001 || this.u.scales.x.max < xs.at(-1) * 0.9999);
  }

  settings(series, log) {
    const style = getComputedStyle(document.documentElement),
      css = name => style.getPropertyValue(name).trim();
    const font = "12px system-ui, sans-serif";
    const axis = {
      stroke: css("--soft"),
      font,
      labelFont: font,
      ticks: { stroke: css("--line"), width: 1 },
      values: (u, splits) => splits.map(tickText),
      filter: (u, splits) => splits
    };
    const grid = { stroke: css("--line"), width: 1 };
    return {
      width: this.plot.clientWidth || 600,
      height: this.height(),
      legend: { show: false },
      padding: [8, 12, 0, 0],
      scales: {
        x: { time: false, distr: this.options.logX ? 3 : 1 },
        y: {
          distr: log ? 3 : 1,
          range: log
            ? (u, low, high) => (low == null ? [1, 10] : [low * 0.97, high * 1.03 + 1e-12])
            : (u, low, high) => (low == null ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true))
        }
      },
      axes: [
        {
          ...axis,
          grid: { show: false },
          label: AXES[this.options.x],
          labelSize: 22,
          size: 30,
          space: 70,
          ...(["step", "tokens"].includes(this.options.x) ? { incrs: WHOLE } : {}),
          ...(this.options.logX ? { splits: (u, i, low, high) => logTicks(low, high) } : {})
        },
        {
          ...axis,
          grid,
          label: METRICS[this.options.metric].axis,
          labelSize: 20,
          size: 54,
          ...(log ? { splits: (u, i, low, high) => logTicks(low, high) } : {})
        }
      ],
      cursor: {
        drag: { x: true, y: false, dist: 8 },
        points: { size: 7, show: (u, i) => !series[i - 1].quiet },
        dataIdx: nearest
      },
      series: [
        {},
        ...series.map(({ run, width, dots, quiet, main }) => ({
          label: run.name,
          stroke: css(`--c${run.colour % COLOURS}`) + (quiet ? "38" : ""),
          width,
          spanGaps: true,
          dash: run.colour >= COLOURS ? [7, 4] : undefined,
          points: { show: Boolean(dots && !quiet), size: main ? 6 : 4, fill: css(`--c${run.colour % COLOURS}`) }
        }))
      ],
      hooks: {
        setCursor: [() => this.showValues()],
        setScale: [
          () => {
            this.reset.hidden = !this.u || !this.isZoomed();
          }
        ]
      }
    };
  }

  height() {
    return innerWidth < 600 ? 240 : Math.max(280, Math.min(420, innerHeight * 0.42));
  }

  resize() {
    if (this.u && this.plot.clientWidth && this.plot.clientWidth !== this.u.width) {
      this.u.setSize({ width: this.plot.clientWidth, height: this.height() });
    }
  }

  drawLegend(series) {
    this.values = new Map();
    this.legend.replaceChildren(
      ...this.runs.map(run => {
        const values = el("span", { class: "values" });
        this.values.set(run.id, values);
        return el(
          "li",
          {},
          el(
            "button",
            {
              type: "button",
              "aria-pressed": String(!this.hidden.has(run.id)),
              onclick: () => {
                if (!this.hidden.delete(run.id)) this.hidden.add(run.id);
                this.redraw();
                [...this.legend.querySelectorAll("button")][this.runs.indexOf(run)]?.focus();
              }
            },
            el("span", { class: `swatch c${run.colour % COLOURS}${run.colour >= COLOURS ? " dashed" : ""}` }),
            run.name,
            values
          )
        );
      })
    );
    this.drawn = series;
    this.showValues();
  }

  /** The values at the cursor; without one, the last. */
  showValues() {
    if (!this.u || !this.drawn) return;
    const { idx } = this.u.cursor,
      values = new Map();
    this.drawn.forEach(({ run, quiet, main, ys }, i) => {
      if (quiet) return;
      const at = idx == null ? null : (this.u.cursor.idxs?.[i + 1] ?? null);
      const number = idx == null ? ys.at(-1) : at == null ? null : this.u.data[i + 1][at];
      const name = main && METRICS[this.options.metric].logged ? "val " : "";
      if (number != null) values.set(run.id, [...(values.get(run.id) ?? []), name + shown(number)]);
    });
    for (const [id, element] of this.values) say(element, (values.get(id) ?? []).join(" · "));
  }
}

/** For each series its own point that is nearest to the cursor. */
function nearest(u, seriesIndex, hovered) {
  const values = u.data[seriesIndex];
  if (values[hovered] != null) return hovered;
  for (let d = 1; d < values.length; d++) {
    if (values[hovered - d] != null) return hovered - d;
    if (values[hovered + d] != null) return hovered + d;
  }
  return hovered;
}

function positive(xs, ys) {
  const from = xs.findIndex(x => x > 0);
  return from < 0 ? [[], []] : [xs.slice(from), ys.slice(from)];
}
