// What can be done with a run: write with it, pause, resume, stop, duplicate and delete it.

import { ask, remove } from "./api.js";
import { button, doing, el, isActive, say, writeAddress } from "./dom.js";

const CAN_RESUME = ["paused", "cancelled", "failed"];

export class RunActions {
  /** head shows errors and messages, and gets the focus of a button that disappears. */
  constructor(id, isJob, head, refresh) {
    Object.assign(this, { isJob, head, refresh, details: null });
    const job = `/v1/fine_tuning/jobs/${id}`;
    this.path = isJob ? job : `/v1/runs/${id}`;
    this.writeWith = el("a", { class: "button first" }, "Write with it");
    this.pause = this.makeButton("pause", "Pause", `${job}/pause`, "Saving, to pause.");
    this.resume = this.makeButton("resume", "Resume", `${job}/resume`, "Resuming.");
    const stopPath = isJob ? `${job}/cancel` : `/v1/runs/${id}/stop`;
    this.stop = this.makeButton("stop", "Stop", stopPath, "Saving, to stop.");
    const duplicate = el("a", { class: "button", href: `#/new?from=${id}` }, "Duplicate with changes");
    this.erase = button(
      "Delete",
      doing(head.error, () => this.delete()),
      { class: "danger" }
    );
    this.element = el(
      "div",
      { class: "buttons" },
      this.writeWith,
      this.pause,
      this.resume,
      this.stop,
      duplicate,
      this.erase
    );
  }

  /** A button that posts to `path`, and then shows the run anew. `message` is for a screen reader. */
  makeButton(name, text, path, message) {
    const { head } = this;
    const element = button(
      text,
      doing(head.error, async () => {
        say(head.status, message);
        try {
          await ask(path, { method: "POST" });
        } finally {
          await this.refresh();
        }
        if (element.hidden) head.heading.focus();
      }),
      { "data-act": name }
    );
    return element;
  }

  async delete() {
    const { model, summary } = this.details;
    const stays = model ? ` Its model ${model} stays.` : "";
    if (!confirm(`Delete the run ${summary.name}? Its checkpoints, curves, events and notes go.${stays}`)) return;
    await remove(this.path);
    location.hash = "#/runs";
  }

  show(details) {
    this.details = details;
    const focused = document.activeElement; // before a button is hidden
    this.showButtons(details.summary.status);
    const writer = details.model ?? details.checkpoints[0]?.model;
    this.writeWith.hidden = !writer;
    if (writer) this.writeWith.href = writeAddress(writer);
    if (this.element.contains(focused) && focused.hidden) this.head.heading.focus();
  }

  showButtons(status) {
    this.pause.hidden = !this.isJob || !isActive(status);
    this.resume.hidden = !this.isJob || !CAN_RESUME.includes(status);
    this.stop.hidden = !(isActive(status) || (this.isJob && status === "paused"));
    this.erase.hidden = status === "running";
  }
}
