// How a text is written: the settings of sampling, where it stops, and what a model with a source reads.

import { el, field } from "./dom.js";

const SETTINGS = [
  // [name, label, what a field starts with, attributes, hint]
  ["max_tokens", "Most tokens", 200, { min: 1, step: 1 }, ""],
  ["temperature", "Temperature", 0.8, { min: 0, max: 100, step: "any" }, "0: the likeliest"],
  ["top_k", "Top k", 0, { min: 0, step: 1 }, "0: all"],
  ["top_p", "Top p", 1, { min: 0.0001, max: 1, step: "any" }, "1: all"],
  ["min_p", "Min p", 0, { min: 0, max: 1, step: "any" }, "0: all"],
  ["repetition_penalty", "Repetition penalty", 1, { min: 0.01, max: 10, step: "any" }, "1: none"],
  ["n", "Samples", 1, { min: 1, max: 8, step: 1 }, "side by side"],
  ["seed", "Seed", "", { min: 0, max: 2 ** 53 - 9, step: 1, placeholder: "drawn" }, "the same one, the same text"]
];
const SENT = ["max_tokens", "temperature", "top_k", "top_p", "min_p"]; // as they are
const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 2 ** 31;

export class Settings {
  /** kept: what keptValues() returned in an earlier visit; onChange() is called when a person changes a setting. */
  constructor(kept, onChange) {
    const onchange = () => onChange();
    this.inputs = Object.fromEntries(
      SETTINGS.map(([name, , value, attributes]) => [
        name,
        el("input", { type: "number", ...attributes, value: kept[name] ?? value, onchange })
      ])
    );
    this.stops = el("textarea", { rows: 1, class: "code", onchange, value: kept.stops ?? "" });
    this.source = el("textarea", { rows: 3 });
  }

  /** The card of all settings; `others` are the models to write with side by side. */
  makeCard(others) {
    const fields = SETTINGS.map(([name, label, , , hint]) => field(label, this.inputs[name], hint));
    return el(
      "section",
      { class: "card", "aria-label": "Settings" },
      el("h3", {}, "Settings"),
      el("div", { class: "fields" }, fields),
      field("Stop at, one on each line; \\n is a line’s end", this.stops),
      el("details", {}, el("summary", {}, "Side by side with other models"), others),
      el(
        "details",
        {},
        el("summary", {}, "For a model that reads one text and writes another"),
        field("What it reads; the editor’s text then begins its answer", this.source)
      )
    );
  }

  /** What was typed: {name: text}. */
  values() {
    return Object.fromEntries(SETTINGS.map(([name]) => [name, this.inputs[name].value]));
  }

  keptValues() {
    return { ...this.values(), stops: this.stops.value };
  }

  /** Puts in what values() returned, perhaps of an earlier version. */
  put(values) {
    for (const [name, value] of Object.entries(values)) if (this.inputs[name]) this.inputs[name].value = value;
  }

  /** Texts of each model. */
  get sampleCount() {
    return Math.max(1, Number(this.inputs.n.value) || 1);
  }

  /** The seed of the next text: the typed one, or a new one. */
  chooseSeed() {
    return this.number("seed") ?? drawSeed();
  }

  number(name) {
    const { value } = this.inputs[name];
    return value === "" ? undefined : Number(value);
  }

  /** What a completion is asked for, besides model, prompt, seed and number of texts. */
  options() {
    const lines = this.stops.value.split("\n").filter(Boolean);
    const penalty = this.number("repetition_penalty");
    return {
      ...Object.fromEntries(SENT.map(name => [name, this.number(name)])),
      repetition_penalty: penalty === 1 ? undefined : penalty,
      source: this.source.value || undefined,
      stop: lines.length ? lines.map(line => line.replaceAll("\\n", "\n")) : undefined
    };
  }
}
