// What a first visit shows of the run: how far it is, its curves, and what it writes at each evaluation.

import { metrics } from "./api.js";
import { Chart } from "./chart.js";
import { chip, count, duration, el, isActive, say, short } from "./dom.js";
import { secondsLeft } from "./run_head.js";

function factsText(run) {
  if (!run.step) return isActive(run.status) ? "Turning the text into tokens, and the first step …" : "";
  const left = secondsLeft(run);
  const parts = [
    `step ${count(run.step)} of ${count(run.max_iters)}`,
    `loss ${short(run.train_loss)}`,
    left > 0 && `about ${duration(left)} left`
  ];
  return parts.filter(Boolean).join(" · ");
}

export class RunWatch {
  constructor() {
    this.state = el("span");
    this.facts = el("p", { class: "facts", role: "status" });
    this.bar = el("progress", { max: 1, "aria-label": "Steps" });
    this.curves = el("div");
    this.sampleTitle = el("h4");
    this.sample = el("p", { class: "text" });
    this.element = el("div", {}, this.facts, this.bar, this.curves, this.sampleTitle, this.sample);
    this.chart = new Chart(this.curves, "first-chart");
    this.clear();
  }

  /** Knows no run. */
  clear() {
    this.state.replaceChildren();
    this.lines = [];
    this.drawn = "";
  }

  show({ summary: run, samples }) {
    const isDone = run.status === "succeeded";
    this.state.replaceChildren(" ", chip(run.status));
    this.bar.value = run.max_iters ? run.step / run.max_iters : 0;
    this.bar.hidden = isDone;
    say(this.facts, factsText(run));
    say(this.sampleTitle, samples.length ? `What it writes after ${count(samples[0].step)} steps` : "");
    say(this.sample, samples[0]?.text ?? "");
    this.sample.hidden = this.sampleTitle.hidden = !samples.length || isDone;
  }

  /** Asks for new lines, and draws the curves, if the run is at another step than when they were drawn. */
  async draw(id, { step, val_loss: loss, name, flops_per_token: flopsPerToken }) {
    const now = `${step} ${loss}`;
    if (this.drawn === now) return;
    this.drawn = now;
    this.lines = await metrics(id, step, this.lines);
    this.curves.hidden = !this.lines.length;
    this.chart.draw([{ id, name, colour: 0, lines: this.lines, flopsPerToken }]);
  }

  leave() {
    this.chart.leave();
  }
}
