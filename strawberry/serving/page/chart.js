// Curves of runs, drawn by uPlot: metrics and axes to choose from, smoothing, zoom, a legend with the values at the
// cursor.

import { ChartControls } from "./chart_controls.js";
import { COLOURS, plotSettings } from "./chart_plot.js";
import { METRICS, curvesOf, positive } from "./chart_points.js";
import { el, say, size } from "./dom.js";

/* global uPlot */

const shown = n =>
  n == null
    ? ""
    : Math.abs(n) >= 1e4
      ? size(n)
      : Math.abs(n) < 1e-3 && n
        ? n.toExponential(2)
        : String(Number(n.toPrecision(4)));

function nothingText(runs, x) {
  if (!runs.length) return "Choose runs in the table to compare their curves.";
  const lacksFlops = x === "flops" && runs.some(run => !run.flopsPerToken);
  const why = lacksFlops ? " A run that an earlier version started does not know its FLOPs." : "";
  return `Nothing of this is logged yet.${why}`;
}

/** A chart with its controls in `root`. draw(runs) shows [{id, name, lines, colour, flopsPerToken}]. */
export class Chart {
  constructor(root, stored = "chart") {
    this.controls = new ChartControls(stored, whole => this.redraw(whole));
    this.hidden = new Set(); // ids of runs
    this.runs = [];
    this.u = this.shape = null; // the plot, and what it was made for
    this.plot = el("div", { class: "plot" });
    this.note = el("p", { class: "hint plot-note" });
    this.legend = el("ul", { class: "legend", "aria-label": "Curves; press one to hide it" });
    root.append(this.controls.element, this.plot, this.note, this.legend);
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.onScheme = () => this.redraw();
    this.scheme.addEventListener("change", this.onScheme);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.plot);
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

  redraw(whole = false) {
    const options = this.controls.chosen();
    const curves = this.runs.filter(run => !this.hidden.has(run.id)).flatMap(run => curvesOf(run, options));
    this.controls.show();
    say(this.note, curves.length ? "" : nothingText(this.runs, options.x));
    this.plot.hidden = !curves.length;
    if (curves.length) this.drawPlot(curves, options, whole);
    else this.removePlot();
    this.showReset();
    this.drawLegend(curves);
  }

  // ---- the plot ----

  removePlot() {
    this.u?.destroy();
    this.u = this.shape = null;
  }

  /** Draws curves: in the plot that is there, if its axes and series are the same. */
  drawPlot(curves, options, whole) {
    const { metric, x, logX, logY } = options;
    const series = curves.map(({ run, quiet, main }) => [run.id, run.colour, quiet, main]);
    const shape = JSON.stringify([metric, x, logX, logY, this.scheme.matches, series]);
    const data = uPlot.join(curves.map(({ xs, ys }) => (logX ? positive(xs, ys) : [xs, ys])));
    if (this.u && this.shape === shape) {
      this.u.setData(data, whole || !this.isZoomed());
      return;
    }
    const zoom = !whole && this.u && this.isZoomed() ? { ...this.u.scales.x } : null;
    this.removePlot();
    const listeners = { onCursor: () => this.showValues(), onScale: () => this.showReset() };
    this.u = new uPlot(plotSettings(curves, options, this.plotSize(), listeners), data, this.plot);
    this.shape = shape;
    if (zoom) this.u.setScale("x", { min: zoom.min, max: zoom.max });
  }

  isZoomed() {
    const xs = this.u?.data[0] ?? [];
    return xs.length > 1 && (this.u.scales.x.min > xs[0] * 1.0001 || this.u.scales.x.max < xs.at(-1) * 0.9999);
  }

  showReset() {
    this.controls.reset.hidden = !this.u || !this.isZoomed();
  }

  plotSize() {
    const height = innerWidth < 600 ? 240 : Math.max(280, Math.min(420, innerHeight * 0.42));
    return { width: this.plot.clientWidth || 600, height };
  }

  resize() {
    if (this.u && this.plot.clientWidth && this.plot.clientWidth !== this.u.width) this.u.setSize(this.plotSize());
  }

  // ---- the legend ----

  drawLegend(curves) {
    this.values = new Map(); // run's id → the element of its values
    this.legend.replaceChildren(...this.runs.map(run => this.legendItem(run)));
    this.drawn = curves;
    this.showValues();
  }

  legendItem(run) {
    const values = el("span", { class: "values" });
    this.values.set(run.id, values);
    const isDashed = run.colour >= COLOURS;
    const attributes = {
      type: "button",
      "aria-pressed": String(!this.hidden.has(run.id)),
      onclick: () => this.toggle(run)
    };
    const swatch = el("span", { class: `swatch c${run.colour % COLOURS}${isDashed ? " dashed" : ""}` });
    return el("li", {}, el("button", attributes, swatch, run.name, values));
  }

  /** Hides a run's curves, or shows them again. */
  toggle(run) {
    if (!this.hidden.delete(run.id)) this.hidden.add(run.id);
    this.redraw();
    this.legend.querySelectorAll("button")[this.runs.indexOf(run)]?.focus();
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
      const name = main && METRICS[this.controls.options.metric].logged ? "val " : "";
      if (number != null) values.set(run.id, [...(values.get(run.id) ?? []), name + shown(number)]);
    });
    for (const [id, element] of this.values) say(element, (values.get(id) ?? []).join(" · "));
  }
}
