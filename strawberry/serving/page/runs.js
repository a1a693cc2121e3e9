// The runs: their table, and the curves of those that are chosen.

import { get } from "./api.js";
import { el, empty, isActive, sayProblem } from "./dom.js";
import { choose, state } from "./runs_chosen.js";
import { countChanges } from "./runs_columns.js";
import { RunsCurves } from "./runs_curves.js";
import { RunTable } from "./runs_table.js";

export const title = "Runs";
const FIRST_CHOSEN = 5; // runs whose curves a first visit shows

export function mount(root) {
  const view = new RunsPage();
  root.append(view.loading, view.none, view.curves.element, view.table.element);
  return view;
}

const noRuns = () =>
  empty(
    "No runs yet",
    "A run that you start here, or with train.py into a folder that the server knows (--runs), is in a table here.",
    el("a", { class: "button first", href: "#/new" }, "Start a run"),
    el("a", { class: "button", href: "#/first" }, "Train a first model")
  );

/** Forgets the chosen runs that are gone, and chooses some where a person never chose any. */
function updateChosen(all) {
  for (const id of state.chosen.keys()) if (!all.some(run => run.id === id)) state.chosen.delete(id);
  if (state.wasChosen) return;
  for (const run of all.filter(run => run.step > 0).slice(0, FIRST_CHOSEN)) choose(run.id, true);
}

class RunsPage {
  constructor() {
    this.all = null; // the runs, once they are loaded
    this.loading = el("p", { class: "loading" }, "Loading the runs …");
    this.none = el("div");
    this.curves = new RunsCurves();
    this.table = new RunTable(() => this.curves.show(this.all));
    this.curves.element.hidden = this.table.element.hidden = true;
  }

  async refresh() {
    try {
      this.all = (await get("/v1/runs")).data;
    } catch (problem) {
      if (!this.all) sayProblem(this.loading, problem);
      throw problem;
    }
    const { all } = this;
    countChanges(all);
    this.loading.remove();
    this.curves.element.hidden = this.table.element.hidden = !all.length;
    this.none.replaceChildren(...(all.length ? [] : [noRuns()]));
    updateChosen(all);
    if (all.length) {
      this.table.show(all);
      await this.curves.show(all);
    }
    return all.some(run => isActive(run.status));
  }

  leave() {
    this.curves.leave();
  }
}
