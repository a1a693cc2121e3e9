// One run: its curves, texts, keys, checkpoints, events and notes, and what can be done with it.

import { get } from "./api.js";
import { el, isActive, sayProblem } from "./dom.js";
import { RunActions } from "./run_actions.js";
import { Checkpoints } from "./run_checkpoints.js";
import { Command } from "./run_command.js";
import { RunCurves } from "./run_curves.js";
import { Events } from "./run_events.js";
import { RunHead } from "./run_head.js";
import { Keys } from "./run_keys.js";
import { Notes } from "./run_notes.js";
import { Samples } from "./run_samples.js";

export const title = "Run";

export function mount(root, { id }) {
  const loading = el("p", { class: "loading" }, "Loading the run …"),
    run = new RunPage(id, refresh);
  root.append(loading, run.element);

  async function refresh() {
    let details;
    try {
      details = await get(`/v1/runs/${id}`);
    } catch (problem) {
      const isGone = problem.status === 404;
      if (isGone) run.element.hidden = true;
      if (run.element.hidden) showProblem(loading, problem);
      if (isGone) return false;
      throw problem;
    }
    loading.hidden = true;
    run.element.hidden = false;
    await run.show(details);
    return isActive(details.summary.status);
  }

  return { refresh, leave: () => run.leave() };
}

/** Says why there is no run to show. */
function showProblem(loading, problem) {
  loading.hidden = false;
  sayProblem(loading, problem, " ", el("a", { href: "#/runs" }, "All runs"));
}

const column = parts =>
  el(
    "div",
    {},
    parts.map(part => part.element)
  );

/** The parts of the page. It is hidden until there is a run to show. */
class RunPage {
  constructor(id, refresh) {
    const isJob = id.startsWith("ftjob-");
    this.head = new RunHead(isJob);
    this.actions = new RunActions(id, isJob, this.head, refresh);
    this.head.element.append(this.actions.element);
    this.curves = new RunCurves(id);
    this.notes = new Notes(id, this.head.error);
    this.left = [new Samples(), new Checkpoints(id, this.head.error), new Events()];
    this.right = [this.notes, new Command(isJob), new Keys()];
    const columns = [this.left, this.right].map(parts => column(parts));
    this.element = el("div", { class: "run-page" }, this.head.element, this.curves.element);
    this.element.append(el("div", { class: "columns" }, columns));
    this.element.hidden = true;
  }

  async show(details) {
    for (const part of [this.head, this.actions, ...this.left, ...this.right]) part.show(details);
    await this.curves.show(details);
  }

  leave() {
    this.curves.leave();
    this.notes.leave();
  }
}
