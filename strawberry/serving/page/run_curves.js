// The curves of one run.

import { metrics } from "./api.js";
import { Chart } from "./chart.js";
import { section } from "./run_section.js";

export class RunCurves {
  constructor(id) {
    Object.assign(this, { id, lines: [], drawn: "" });
    this.element = section("Curves");
    this.chart = new Chart(this.element, "run-chart");
  }

  /** Asks for new lines, and draws the curves, if the run is at another step or state than when they were drawn. */
  async show({ summary }) {
    const now = `${summary.step} ${summary.val_loss} ${summary.status}`;
    if (this.drawn === now) return;
    this.drawn = now;
    this.lines = await metrics(this.id, summary.step, this.lines);
    const { name, flops_per_token: flopsPerToken } = summary;
    this.chart.draw([{ id: this.id, name, colour: 0, lines: this.lines, flopsPerToken }]);
  }

  leave() {
    this.chart.leave();
  }
}
