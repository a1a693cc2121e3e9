// The form of a new dataset.

import { post } from "./api.js";
import { datasetName } from "./data_datasets.js";
import { bytes, doing, el, field, many, offer, say } from "./dom.js";

const number = input => (input.value === "" ? undefined : Number(input.value));

export class DatasetForm {
  /** chosenFiles() → [{id, bytes, weight}]; onBuild(dataset) gets the dataset whose building has begun. */
  constructor(chosenFiles, onBuild) {
    this.chosenFiles = chosenFiles;
    this.onBuild = onBuild;
    this.makeInputs();
    this.chosen = el("p", { class: "hint", role: "status" });
    this.error = el("p", { class: "error", role: "alert" });
    this.status = el("p", { class: "unseen", role: "status" });
    const form = el(
      "form",
      { onsubmit: doing(this.error, () => this.build()) },
      el("h3", {}, "Build a dataset"),
      this.chosen,
      this.usualFields(),
      this.rareFields(),
      el("button", { class: "first" }, "Build the dataset"),
      this.error,
      this.status
    );
    this.element = el("section", { class: "card", "aria-label": "New dataset" }, form);
  }

  makeInputs() {
    this.name = el("input", { maxlength: 255, autocomplete: "off", placeholder: "stories, say" });
    this.encoder = el("select", { onchange: () => this.showVocabulary() });
    this.vocabulary = el("input", { type: "number", min: 258, step: 1, placeholder: "8192, or fewer" });
    this.share = el("input", { type: "number", min: 0.001, max: 0.999, step: "any", value: 0.1, required: true });
    this.duplicates = el(
      "select",
      {},
      new Option("leave out equal documents", "exact"),
      new Option("leave out similar ones too", "near"),
      new Option("keep all", "none")
    );
    this.similarity = el("input", { type: "number", min: 0.3, max: 1, step: "any", value: 0.8 });
    this.least = el("input", { type: "number", min: 1, step: 1, value: 1 });
    this.most = el("input", { type: "number", min: 1, step: 1, placeholder: "any" });
    this.errors = el("select", {}, new Option("refuse the file", "strict"), new Option("put U+FFFD there", "replace"));
  }

  usualFields() {
    return el(
      "div",
      { class: "fields wide" },
      field("Name", this.name),
      field("Tokens", this.encoder, "How text becomes tokens."),
      field("Vocabulary", this.vocabulary, "As many tokens as are learned."),
      field("Share that validates", this.share, "Whole documents, which training never sees."),
      field("Duplicates", this.duplicates)
    );
  }

  rareFields() {
    const fields = el(
      "div",
      { class: "fields wide" },
      field("Similar from", this.similarity, "Jaccard index, 0.3 to 1"),
      field("Fewest characters of a document", this.least),
      field("Most characters of a document", this.most),
      field("Bytes that are not UTF-8", this.errors)
    );
    return el("details", {}, el("summary", {}, "More"), fields);
  }

  /** Only tokens that are learned have a vocabulary to choose. */
  showVocabulary() {
    this.vocabulary.parentElement.hidden = this.encoder.value !== "";
  }

  offerEncoders(datasets, models) {
    const built = datasets.filter(dataset => dataset.status === "succeeded");
    offer(this.encoder, {
      "": [
        ["", "learned from the text"],
        ["chars", "a token for each character"]
      ],
      "The tokens of a dataset": built.map(dataset => [dataset.id, datasetName(dataset)]),
      "Of a model": models.map(model => [model.id, model.id])
    });
  }

  /** Shows how much text is chosen. */
  showChosen() {
    const chosen = this.chosenFiles();
    const sum = chosen.reduce((sum, file) => sum + file.bytes, 0);
    const none = "Choose the files of which it is built. A file with weight 2 is read twice as often.";
    say(this.chosen, chosen.length ? `${many(chosen.length, "file")} chosen, ${bytes(sum)}.` : none);
  }

  async build() {
    const files = this.chosenFiles();
    if (!files.length) throw new Error("Choose at least one file above.");
    const made = await post("/v1/datasets", this.options(files));
    say(this.status, `The dataset ${datasetName(made)} is ${made.status}.`);
    await this.onBuild(made);
  }

  /** The body of the request. */
  options(files) {
    const weights = files.map(file => file.weight);
    return {
      files: files.map(file => file.id),
      weights: weights.some(weight => weight !== 1) ? weights : undefined,
      name: this.name.value,
      deduplicate: this.duplicates.value,
      similarity: this.duplicates.value === "near" ? number(this.similarity) : undefined,
      validation_share: number(this.share),
      encoder: this.encoder.value || undefined,
      vocab_size: this.encoder.value ? undefined : number(this.vocabulary),
      min_chars: number(this.least),
      max_chars: number(this.most),
      errors: this.errors.value
    };
  }
}
