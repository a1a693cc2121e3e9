// What a new run starts from: its preset or model, its data, its name and its seed.

import { el, field, offer } from "./dom.js";

const isUsable = dataset => !["failed", "cancelled"].includes(dataset.status);

export class RunSource {
  /** onStart(name) gets another preset or model; onData() is called for another dataset or file. */
  constructor(onStart, onData) {
    this.start = el("select", { onchange: () => onStart(this.start.value) });
    this.data = el("select", { onchange: () => onData() });
    this.suffix = el("input", {
      pattern: "[A-Za-z0-9_\\-]{1,64}",
      title: "1 to 64 letters, digits, - and _",
      autocomplete: "off",
      placeholder: "wide, say"
    });
    this.seed = el("input", { type: "number", min: 0, max: 2 ** 31 - 1, step: 1, placeholder: "drawn" });
    this.noData = el(
      "p",
      { class: "warning" },
      "There is no text to train on yet. ",
      el("a", { href: "#/data" }, "Bring a file"),
      " first."
    );
    this.element = el(
      "section",
      { class: "card", "aria-label": "Beginning" },
      el("h2", {}, "New run"),
      el(
        "div",
        { class: "fields wide" },
        field("Start from", this.start, "A preset, or a model to train further."),
        field("Train on", this.data, "A dataset, or a file, of which one is built."),
        field("Part of the model’s name", this.suffix),
        field("Seed", this.seed, "The same seed repeats the run.")
      ),
      this.noData
    );
  }

  offerStart({ presets, models }, chosen) {
    const choices = list => list.map(({ id }) => [id, id]);
    offer(this.start, { Presets: choices(presets.data), Models: choices(models) }, chosen);
  }

  offerData({ datasets, files }, chosen) {
    const usable = datasets.filter(isUsable);
    const groups = {
      Datasets: usable.map(one => [one.id, one.name || one.id.slice(0, 11)]),
      Files: files.map(file => [file.id, file.filename])
    };
    offer(this.data, groups, chosen);
    this.noData.hidden = usable.length + files.length > 0;
  }

  /** The options of a job that are chosen here. */
  options() {
    if (!this.data.value) throw new Error("Choose what to train on. A file or a dataset is brought under Data.");
    return {
      model: this.start.value,
      training_file: this.data.value,
      suffix: this.suffix.value || undefined,
      seed: this.seed.value === "" ? undefined : Number(this.seed.value)
    };
  }
}
