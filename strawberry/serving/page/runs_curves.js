// The curves of the chosen runs.

import { metrics } from "./api.js";
import { Chart } from "./chart.js";
import { el } from "./dom.js";
import { state } from "./runs_chosen.js";

export class RunsCurves {
  constructor() {
    this.known = new Map(); // id → {at, lines}
    this.element = el("section", { class: "card", "aria-label": "Curves" });
    this.chart = new Chart(this.element);
  }

  /** Asks for what is new of the chosen runs, and draws them. */
  async show(all) {
    const chosen = all.filter(run => state.chosen.has(run.id));
    await Promise.all(chosen.map(run => this.load(run)));
    const curve = ({ id, name, flops_per_token: flopsPerToken }) => {
      return { id, name, colour: state.chosen.get(id), lines: this.known.get(id).lines, flopsPerToken };
    };
    this.chart.draw(chosen.map(curve));
  }

  async load({ id, step, val_loss: loss }) {
    const at = `${step} ${loss}`,
      known = this.known.get(id);
    if (known?.at === at) return;
    this.known.set(id, { at, lines: await metrics(id, step, known?.lines) });
  }

  leave() {
    this.chart.leave();
  }
}
