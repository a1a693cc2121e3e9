// The checkpoints of a run: which is the best, and writing with one or downloading it.

import { download } from "./api.js";
import { ago, button, bytes, count, doing, el, keep, say, short, when, writeAddress } from "./dom.js";
import { section, table } from "./run_section.js";

function writeLink({ model, step }) {
  return el(
    "a",
    { class: "button small", href: writeAddress(model) },
    "Write with it",
    el("span", { class: "unseen" }, ` (step ${step})`)
  );
}

export class Checkpoints {
  /** error: the element that shows why a download fails. */
  constructor(id, error) {
    Object.assign(this, { id, error });
    this.none = el("p", { class: "hint" });
    this.rows = el("tbody");
    this.element = section("Checkpoints", this.none, table("plain", "Checkpoints", this.rows));
  }

  show({ checkpoints }) {
    const best = Math.min(...checkpoints.map(one => one.val_loss ?? Infinity));
    say(this.none, checkpoints.length ? "" : "None yet.");
    keep(
      this.rows,
      checkpoints,
      one => one.step,
      one => this.makeRow(one),
      (row, one) => say(row.querySelector(".best"), one.val_loss === best && checkpoints.length > 1 ? " best" : "")
    );
  }

  makeRow(one) {
    const loss = one.val_loss == null ? "not evaluated" : `loss ${short(one.val_loss)}`;
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, `step ${count(one.step)}`),
      el("td", {}, loss, el("span", { class: "best" })),
      el("td", {}, el("time", { title: when(one.saved_at) }, ago(one.saved_at))),
      el("td", {}, el("div", { class: "buttons" }, writeLink(one), this.downloadButton(one)))
    );
  }

  downloadButton({ step, model, bytes: fileBytes }) {
    return button(
      ["Download", el("span", { class: "unseen" }, ` step ${step}`)],
      doing(this.error, () => download(`/v1/runs/${this.id}/checkpoints/${step}`, model)),
      { class: "small", title: bytes(fileBytes) }
    );
  }
}
