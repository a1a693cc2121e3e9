// The list of models: what each needs on disk, and what can be done with it.

import { deleteButton } from "./data_delete.js";
import { bytes, el, keep, say, writeAddress } from "./dom.js";

function updateRow(row, { arch, bytes: onDisk, loaded }) {
  say(row.querySelector(".facts"), `${arch}, ${bytes(onDisk)}${loaded ? ", in memory" : ""}`);
}

export class ModelList {
  /** refresh() loads the page's data again. */
  constructor(refresh) {
    this.refresh = refresh;
    this.heading = el("h2", { tabindex: "-1" }, "Models");
    this.error = el("p", { class: "error", role: "alert" });
    this.none = el("p", { class: "hint" });
    this.list = el("ul", { class: "list" });
    this.element = el(
      "section",
      { class: "card", "aria-label": "Models" },
      this.heading,
      this.error,
      this.none,
      this.list
    );
  }

  show(models) {
    say(this.none, models.length ? "" : "No models yet.");
    keep(
      this.list,
      models,
      model => model.id,
      model => this.row(model),
      updateRow
    );
  }

  row(model) {
    return el(
      "li",
      { class: "row" },
      el("span", { class: "grow" }, model.id),
      el("span", { class: "facts" }),
      el("a", { class: "button small", href: writeAddress(model.id) }, "Write with it"),
      this.deleteButton(model)
    );
  }

  deleteButton(model) {
    return deleteButton(
      {
        path: `/v1/models/${encodeURIComponent(model.id)}`,
        name: model.id,
        effect: " Its file is removed from the server's disk for good.",
        focus: () => this.heading,
        error: this.error,
        refresh: this.refresh
      },
      { class: "small danger", "aria-label": `Delete the model ${model.id}` }
    );
  }
}
