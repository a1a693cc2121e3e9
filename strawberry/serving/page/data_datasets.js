// The list of datasets: how far each is built, what it holds, and what can be done with it.

import { ask } from "./api.js";
import { deleteButton } from "./data_delete.js";
import { preview } from "./data_documents.js";
import { ago, button, bytes, chip, count, doing, el, isActive, keep, many, say, size } from "./dom.js";

const LIMIT = 100; // as many are loaded
const LEFT_OUT = {
  exact_duplicates: "equal to another",
  near_duplicates: "nearly equal to another",
  too_short: "too short",
  too_long: "too long",
  not_utf8: "not UTF-8",
  other_kinds: "of another kind",
  without_texts: "without texts"
};

export const DATASETS_PATH = `/v1/datasets?limit=${LIMIT}`;
export const datasetName = dataset => dataset.name || dataset.id.slice(0, 11);

function leftOutText(numbers) {
  const parts = Object.entries(numbers).filter(([, n]) => n);
  return parts.map(([why, n]) => `${count(n)} ${LEFT_OUT[why] ?? why}`).join(", ") || "nothing";
}

/** [name, text] of each number of a dataset; none while it is not built. */
function facts({ result, bytes: onDisk }) {
  if (!result) return [];
  return [
    ["Documents", count(result.documents)],
    ["Tokens", `${size(result.training.tokens)} train, ${size(result.validation.tokens)} validate`],
    ["Vocabulary", count(result.encoder.vocab_size)],
    ["Bytes per token", (result.bytes / Math.max(1, result.tokens)).toFixed(2)],
    ["Left out", leftOutText(result.left_out)],
    ["On disk", bytes(onDisk)]
  ];
}

function stateText({ status, progress, recipe, created_at }) {
  if (isActive(status)) return `${progress.phase}, ${Math.round(100 * progress.done)} %`;
  return `${many(recipe.files.length, "file")}, built ${ago(created_at)}`;
}

const previews = id => [
  preview(`/v1/datasets/${id}/documents?limit=3`, "First documents of training"),
  preview(`/v1/datasets/${id}/documents?limit=3&split=validation`, "First documents of validation")
];

/** Shows in a dataset's row what has changed. */
function updateRow(row, dataset) {
  const { id, status, progress, error } = dataset;
  const content = JSON.stringify(dataset);
  if (row.content === content) return;
  row.content = content;
  const part = selector => row.querySelector(selector);
  part(".state").replaceChildren(chip(status));
  part("progress").hidden = !isActive(status);
  part("progress").value = progress.done;
  say(part(".error"), error?.message ?? "");
  say(part(".facts"), stateText(dataset));
  const numbers = facts(dataset).map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)));
  part("dl").replaceChildren(...numbers);
  part(".use").hidden = status !== "succeeded";
  part(".cancel").hidden = !isActive(status);
  part(".erase").hidden = status === "running";
  if (status === "succeeded" && !part("details")) row.append(...previews(id));
}

export class DatasetList {
  /** refresh() loads the page's data again. */
  constructor(refresh) {
    this.refresh = refresh;
    this.heading = el("h2", { tabindex: "-1" }, "Datasets");
    this.disk = el("p", { class: "facts" });
    this.none = el("p", { class: "hint" });
    this.list = el("ul", { class: "list" });
    this.element = el(
      "section",
      { class: "card", "aria-label": "Datasets" },
      el("div", { class: "bar" }, this.heading, this.disk),
      this.none,
      this.list
    );
  }

  show(datasets) {
    const few = datasets.length ? "" : "No datasets yet. A run on a file builds one by itself; here you choose how.";
    say(this.none, datasets.length === LIMIT ? `The newest ${LIMIT} are shown.` : few);
    keep(
      this.list,
      datasets,
      dataset => dataset.id,
      dataset => this.row(dataset),
      updateRow
    );
  }

  /** use: bytes on the server's disk, of each kind. */
  showDisk({ files, datasets, runs, models, free }) {
    const used = `files ${bytes(files)}, datasets ${bytes(datasets)}, runs ${bytes(runs)}, models ${bytes(models)}`;
    say(this.disk, `On disk: ${used}; ${bytes(free)} free`);
  }

  focus(id) {
    this.list.querySelector(`[data-key="${id}"] h4`)?.focus();
  }

  row(dataset) {
    const error = el("p", { class: "error", role: "alert" });
    return el(
      "li",
      {},
      el(
        "div",
        { class: "row" },
        el("h4", { class: "grow", tabindex: "-1" }, datasetName(dataset)),
        el("span", { class: "state" })
      ),
      el("progress", { max: 1, "aria-label": "Progress" }),
      el("p", { class: "facts" }),
      el("dl", { class: "numbers" }),
      error,
      el(
        "div",
        { class: "buttons" },
        el("a", { class: "button small use", href: `#/new?dataset=${dataset.id}` }, "Train on it"),
        this.cancelButton(dataset, error),
        this.deleteButton(dataset, error)
      )
    );
  }

  cancelButton(dataset, error) {
    const cancel = doing(error, async () => {
      await ask(`/v1/datasets/${dataset.id}/cancel`, { method: "POST" });
      await this.refresh();
    });
    return button("Cancel", cancel, { class: "small cancel" });
  }

  deleteButton(dataset, error) {
    const name = datasetName(dataset);
    return deleteButton(
      {
        path: `/v1/datasets/${dataset.id}`,
        name,
        effect: " Its files, and the models trained on it, stay.",
        focus: () => this.heading,
        error,
        refresh: this.refresh
      },
      { class: "small danger erase", "aria-label": `Delete the dataset ${name}` }
    );
  }
}
