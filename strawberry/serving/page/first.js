// A first visit: from a text to a trained model and what it writes, in three steps.

import { ask, get, post } from "./api.js";
import { button, doing, el, isActive, say } from "./dom.js";
import { FirstText } from "./first_text.js";
import { RunWatch } from "./first_watch.js";
import { DropZone } from "./upload.js";

export const title = "Train your first model";

const VOCAB_SIZE = 1024,
  FEW_BYTES = 60_000; // less text than that has no 1,024 tokens worth a name: characters do
/** The preset "tiny", smaller: a minute or two on two cores. */
export const KEYS = {
  max_iters: 240,
  eval_interval: 40,
  log_interval: 5,
  eval_iters: 4,
  sample_length: 80,
  "checkpoints.interval": 120,
  "model_hyperparams.block_size": 128,
  "model_hyperparams.n_layer": 2,
  compile: false
};
const ABOUT =
  "A language model learns to continue text from text that you give it. A small one takes a minute or two, and nothing leaves this machine.";

export function mount(root) {
  const view = new FirstVisit();
  root.append(view.element);
  return view;
}

/** Builds a dataset of the files and begins a run with it. Returns the run's id. */
async function startRun(files) {
  const isShort = files.reduce((sum, file) => sum + file.bytes, 0) < FEW_BYTES;
  const dataset = await post("/v1/datasets", {
    files: files.map(file => file.id),
    name: files.length === 1 ? files[0].filename : "my text",
    ...(isShort ? { encoder: "chars" } : { vocab_size: VOCAB_SIZE })
  });
  const run = await post("/v1/fine_tuning/jobs", {
    model: "tiny",
    training_file: dataset.id,
    hyperparameters: KEYS,
    suffix: "first",
    seed: 1
  });
  return run.id;
}

function stage(number, name, ...children) {
  const n = el("span", { class: "n", "aria-hidden": "true" }, String(number));
  return el("li", { class: "stage" }, el("h3", {}, n, name), children);
}

class FirstVisit {
  constructor() {
    this.id = sessionStorage.getItem("first"); // of the run; null before there is one
    this.error = el("p", { class: "error", role: "alert" });
    this.status = el("p", { class: "hint", role: "status" });
    this.zone = new DropZone(this.error, this.status, files => this.train(files));
    this.again = button("Begin again", () => this.beginAgain());
    this.bring = this.makeBring();
    this.watch = new RunWatch();
    this.text = new FirstText();
    this.stages = [
      stage(1, "Bring a text", this.bring),
      stage(2, "Watch it learn", this.watch.element),
      stage(3, "Read what it writes", this.text.element)
    ];
    this.stages[1].querySelector("h3").append(this.watch.state);
    this.element = el(
      "section",
      { class: "card first-visit", "aria-labelledby": "first-title" },
      el("h2", { id: "first-title" }, title),
      el("p", {}, ABOUT),
      el("ol", { class: "stages" }, this.stages),
      this.status,
      this.error,
      this.again
    );
  }

  makeBring() {
    const useExample = doing(this.error, async () => {
      say(this.status, "Taking the documentation of this project …");
      const text = await (await ask("/v1/example_text")).text();
      await this.zone.send([new File([text], "documentation.md", { type: "text/markdown" })]);
    });
    const example = button("Use an example", useExample);
    const or = el("p", { class: "or" }, "No text at hand? ", example, " It is the documentation of this project.");
    return el("div", {}, this.zone.element, or);
  }

  async train(files) {
    say(this.status, "Building the dataset and the run …");
    this.id = await startRun(files);
    sessionStorage.setItem("first", this.id);
    say(this.status, "");
    await this.refresh();
  }

  beginAgain() {
    sessionStorage.removeItem("first");
    this.id = null;
    this.watch.clear();
    this.text.clear();
    this.showStages(null);
  }

  /** Shows the stages that a run in this state has come to; null: no run. */
  showStages(status) {
    const isDone = status === "succeeded";
    this.stages[0].classList.toggle("done", status !== null);
    this.stages[1].classList.toggle("done", isDone);
    this.bring.hidden = status !== null;
    this.watch.element.hidden = status === null;
    this.text.element.hidden = !isDone;
    this.again.hidden = status === null || isActive(status);
  }

  // ---- what app.js calls ----

  async refresh() {
    const details = await this.load();
    this.showStages(details?.summary.status ?? null);
    if (!details) return false;
    const { summary, model, error } = details;
    this.watch.show(details);
    if (error) say(this.error, error);
    await this.watch.draw(this.id, summary);
    if (model) await this.text.write(model, this.id);
    return isActive(summary.status) || (summary.status === "succeeded" && !this.text.isWritten);
  }

  /** The run; null where there is none. */
  async load() {
    if (!this.id) return null;
    try {
      return await get(`/v1/runs/${this.id}`);
    } catch (problem) {
      if (problem.status !== 404) throw problem;
      this.beginAgain(); // it was deleted
      return null;
    }
  }

  leave() {
    this.watch.leave();
  }
}
