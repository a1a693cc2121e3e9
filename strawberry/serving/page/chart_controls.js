// The controls of a chart: which metric against which axis, logarithmic axes, smoothing, and the whole range again.

import { AXES, METRICS } from "./chart_points.js";
import { button, el } from "./dom.js";

export class ChartControls {
  /** stored: the name under which this tab keeps the choice; onChange(whole) is called when it is another, with true if
      the whole range is to be shown. */
  constructor(stored, onChange) {
    Object.assign(this, { stored, onChange });
    this.options = { metric: "loss", x: "step", logX: false, logY: null, smoothing: 0.6 };
    Object.assign(this.options, JSON.parse(sessionStorage.getItem(stored) ?? "{}"));
    this.logX = this.makeBox("logX");
    this.logY = this.makeBox("logY");
    this.smoothing = el("input", {
      type: "range",
      min: 0,
      max: 0.98,
      step: 0.02,
      value: this.options.smoothing,
      oninput: () => this.set("smoothing", Number(this.smoothing.value))
    });
    this.reset = button("Whole range", () => onChange(true), { class: "small" });
    this.reset.hidden = true;
    const labels = Object.fromEntries(Object.entries(METRICS).map(([name, metric]) => [name, metric.label]));
    this.element = el(
      "div",
      { class: "chart-controls" },
      this.makeChoice("Show", "metric", labels),
      this.makeChoice("against", "x", AXES),
      el("label", { class: "check" }, this.logY, "log y"),
      el("label", { class: "check" }, this.logX, "log x"),
      el("label", { class: "inline" }, el("span", {}, "smooth"), this.smoothing),
      this.reset
    );
  }

  makeBox(name) {
    const box = el("input", {
      type: "checkbox",
      checked: Boolean(this.options[name]),
      onchange: () => this.set(name, box.checked)
    });
    return box;
  }

  makeChoice(label, name, choices) {
    const chosen = this.options[name];
    const select = el(
      "select",
      { onchange: () => this.set(name, select.value) },
      Object.entries(choices).map(([value, text]) => new Option(text, value, false, value === chosen))
    );
    return el("label", { class: "inline" }, el("span", {}, label), select);
  }

  set(name, value) {
    if (name === "metric") this.options.logY = null; // its own default
    this.options[name] = value;
    sessionStorage.setItem(this.stored, JSON.stringify(this.options));
    this.onChange(name !== "smoothing");
  }

  /** The options, with the metric's own choice of a logarithmic axis where a person made none. */
  chosen() {
    const { log = false } = METRICS[this.options.metric];
    return { ...this.options, logY: this.options.logY ?? log };
  }

  /** Shows what the metric has. */
  show() {
    const { metric, logY } = this.chosen();
    this.logY.checked = logY;
    this.smoothing.disabled = !METRICS[metric].logged;
  }
}
