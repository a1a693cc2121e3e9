// The files: where they are brought, and which of them a dataset is built of.

import { deleteButton } from "./data_delete.js";
import { preview } from "./data_documents.js";
import { ago, bytes, el, keep, say } from "./dom.js";
import { DropZone } from "./upload.js";

const boxOf = row => row.querySelector("[type=checkbox]");
const weightOf = row => Number(row.querySelector("[type=number]").value);

export class FileList {
  /** refresh() loads the page's data again; onChoice() is called when other files are chosen. */
  constructor(refresh, onChoice) {
    this.refresh = refresh;
    this.onChoice = onChoice;
    this.files = [];
    this.error = el("p", { class: "error", role: "alert" });
    this.status = el("p", { class: "hint", role: "status" });
    this.zone = new DropZone(this.error, this.status, stored => this.chooseStored(stored));
    this.none = el("p", { class: "hint" });
    this.list = el("ul", { class: "list" });
    this.element = el(
      "section",
      { class: "card", "aria-label": "Files" },
      el("h2", {}, "Files"),
      el("p", {}),
      this.zone.element,
      this.status,
      this.error,
      this.none,
      this.list
    );
  }

  show(files) {
    this.files = files;
    say(this.none, files.length ? "" : "No files yet.");
    keep(
      this.list,
      files,
      file => file.id,
      file => this.row(file)
    );
  }

  /** Chooses the files that were just uploaded. */
  async chooseStored(stored) {
    await this.refresh();
    for (const { id } of stored) {
      const row = this.rowOf(id);
      if (row) boxOf(row).checked = true;
    }
    this.onChoice();
  }

  /** The chosen files, each with its weight: [{id, bytes, weight}]. */
  chosen() {
    const rows = this.files.map(({ id, bytes }) => ({ id, bytes, row: this.rowOf(id) }));
    return rows
      .filter(({ row }) => row && boxOf(row).checked)
      .map(({ id, bytes, row }) => ({ id, bytes, weight: weightOf(row) }));
  }

  rowOf(id) {
    return this.list.querySelector(`[data-key="${id}"]`);
  }

  row(file) {
    const box = el("input", { type: "checkbox", onchange: () => this.onChoice() });
    return el(
      "li",
      {},
      el(
        "div",
        { class: "row" },
        el("label", { class: "check grow" }, box, el("span", {}, file.filename)),
        el("span", { class: "facts" }, `${bytes(file.bytes)}, ${ago(file.created_at)}`),
        el("label", { class: "inline" }, el("span", {}, "weight"), this.weightInput(file)),
        this.deleteButton(file)
      ),
      preview(`/v1/files/${file.id}/documents?limit=3`)
    );
  }

  weightInput(file) {
    return el("input", {
      type: "number",
      class: "weight",
      min: 0.001,
      max: 1000,
      step: "any",
      value: 1,
      "aria-label": `Weight of ${file.filename}`
    });
  }

  deleteButton(file) {
    return deleteButton(
      {
        path: `/v1/files/${file.id}`,
        name: file.filename,
        effect: " Datasets that were built of it stay.",
        focus: () => this.zone.element.querySelector("input"),
        error: this.error,
        refresh: this.refresh
      },
      { class: "small danger", "aria-label": `Delete ${file.filename}` }
    );
  }
}
