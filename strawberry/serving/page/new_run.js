// A new run: a form made from the schema of the keys, what the run will cost, and its start.

import { get, post } from "./api.js";
import { CostPanel } from "./cost.js";
import { button, doing, el, lastPart, many, say, sayProblem, value } from "./dom.js";
import { readRun } from "./new_run_duplicate.js";
import { Estimator } from "./new_run_estimate.js";
import { JsonView } from "./new_run_json.js";
import { KeyForm } from "./new_run_keys.js";
import { RunSource } from "./new_run_source.js";
import { RunValues } from "./new_run_values.js";
import { keysOf, nest, parse } from "./schema.js";

export const title = "New run";

export function mount(root, { query }) {
  const view = new NewRun(query);
  root.append(view.loading, view.form);
  return view;
}

/** What a run can start from: {presets, datasets, files, models}. */
async function loadAvailable() {
  const list = async path => (await get(path)).data;
  const [presets, datasets, files, models] = await Promise.all([
    get("/v1/presets"),
    list("/v1/datasets?limit=100"),
    list("/v1/files?limit=1000"),
    list("/v1/models")
  ]);
  return { presets, datasets, files, models };
}

/** The keys that a person sets, each with its schema. */
function formKeys({ config_schema, server_keys }, arch) {
  const schemas = keysOf(config_schema, arch);
  for (const key of [...server_keys, "$schema", "seed"]) schemas.delete(key);
  return schemas;
}

/** "2 keys differ from tiny: …" */
function changesText({ changes, changedCount: n }, start) {
  if (!n) return `All keys are those of ${start}.`;
  const parts = Object.entries(changes).map(([key, to]) => `${lastPart(key)} ${value(to)}`);
  return `${many(n, "key")} differ${n === 1 ? "s" : ""} from ${start}: ${parts.join(", ")}.`;
}

class NewRun {
  constructor(query) {
    this.query = query;
    this.available = null; // what loadAvailable() returns, once it has
    this.schemas = new Map();
    this.values = new RunValues();
    this.json = new JsonView(given => this.replaceChanges(given));
    this.source = new RunSource(
      name => this.begin(name, {}),
      () => this.estimator.ask()
    );
    this.keys = new KeyForm(
      (key, text) => this.change(key, text),
      key => this.putBack(key)
    );
    this.estimator = new Estimator(
      () => this.estimateOptions(),
      estimate => this.showEstimate(estimate),
      text => this.showProblems(text)
    );
    this.cost = new CostPanel();
    this.changed = el("p", { class: "hint", role: "status" });
    this.error = el("p", { class: "error", role: "alert" });
    this.loading = el("p", { class: "loading" }, "Loading the presets …");
    this.form = this.makeForm();
    this.form.hidden = true;
  }

  makeForm() {
    const keys = el(
      "section",
      { class: "card", "aria-label": "Keys" },
      this.keys.bar,
      this.keys.groups,
      this.json.element
    );
    return el(
      "form",
      { novalidate: true, onsubmit: doing(this.error, () => this.startRun()) },
      el(
        "div",
        { class: "columns wide-left plan" },
        el("div", {}, this.source.element, keys),
        el("div", {}, this.makeCostCard())
      )
    );
  }

  makeCostCard() {
    return el(
      "section",
      { class: "card sticky", "aria-label": "Cost" },
      el("h2", {}, "What it will cost"),
      el("p", {}),
      this.cost.element,
      this.changed,
      el(
        "div",
        { class: "buttons" },
        el("button", { class: "first" }, "Start the run"),
        button("Forget the changes", () => this.begin(this.source.start.value, {}))
      ),
      this.error
    );
  }

  // ---- what app.js calls ----

  async refresh() {
    if (this.available) return false;
    try {
      this.available = await loadAvailable();
    } catch (problem) {
      sayProblem(this.loading, problem);
      throw problem;
    }
    this.source.offerData(this.available, this.query.get("dataset") ?? undefined);
    try {
      await this.beginAsAsked();
    } catch (problem) {
      await this.begin("tiny", {});
      say(this.error, problem.message);
    }
    this.loading.hidden = true;
    this.form.hidden = false;
    return false;
  }

  leave() {
    this.estimator.stop();
  }

  // ---- where it begins ----

  /** Begins with the run or the preset that the address names. */
  async beginAsAsked() {
    const from = this.query.get("from");
    if (!from) return this.begin(this.query.get("preset") ?? "tiny", {});
    const { start, changes, data, seed } = await readRun(from, this.available);
    if (data !== undefined) this.source.data.value = data;
    if (seed !== undefined) this.source.seed.value = seed;
    return this.begin(start, changes);
  }

  /** Makes every field anew: of a preset or a model, with some changes. */
  async begin(name, changes) {
    const { presets } = this.available;
    say(this.error, "");
    this.source.offerStart(this.available, name);
    const known = presets.data.find(preset => preset.id === name);
    const base = (known ?? (await get(`/v1/presets/${encodeURIComponent(name)}`))).values;
    this.values.begin(base, changes);
    this.schemas = formKeys(presets, base["model_hyperparams.arch"]);
    this.keys.build(this.schemas, this.values);
    this.showAll();
    this.estimator.ask(0);
  }

  async startRun() {
    const { model, training_file, suffix, seed } = this.source.options();
    const hyperparameters = nest(this.values.changes);
    const made = await post("/v1/fine_tuning/jobs", { model, training_file, hyperparameters, suffix, seed });
    location.hash = `#/runs/${made.id}`;
  }

  // ---- changes ----

  change(key, text) {
    this.values.change(key, parse(text, this.schemas.get(key)));
    this.keys.showMark(key);
    this.json.show(this.values.changes);
    this.showCounts();
    this.estimator.ask();
  }

  putBack(key) {
    this.values.putBack(key);
    this.showAll();
    this.estimator.ask();
  }

  /** Takes all changes from the JSON view. */
  replaceChanges(given) {
    const seed = this.values.replace(given, this.available.presets.server_keys);
    if (Number.isInteger(seed)) this.source.seed.value = seed;
    this.keys.showValues();
    this.showCounts();
    this.keys.showFilter();
    this.estimator.ask();
  }

  showAll() {
    this.keys.showValues();
    this.json.show(this.values.changes);
    this.showCounts();
    this.keys.showFilter();
  }

  showCounts() {
    this.keys.showCounts();
    say(this.changed, changesText(this.values, this.source.start.value));
  }

  // ---- what it costs ----

  estimateOptions() {
    const dataset = this.available.datasets.find(dataset => dataset.id === this.source.data.value);
    return {
      model: this.source.start.value,
      hyperparameters: nest(this.values.changes),
      vocab_size: dataset?.result?.encoder.vocab_size
    };
  }

  showEstimate(estimate) {
    this.values.complete(estimate.values);
    this.keys.showValues();
    this.cost.show(estimate);
    this.showProblems("");
  }

  /** Says why there is no estimate; "" where there is one again. */
  showProblems(text) {
    this.cost.fail(text);
    this.keys.showProblems(text);
  }
}
