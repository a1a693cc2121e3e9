// What a person writes about a run.

import { post } from "./api.js";
import { button, doing, el, say } from "./dom.js";
import { section } from "./run_section.js";

export class Notes {
  /** error: the element that shows why the notes are not saved. */
  constructor(id, error) {
    Object.assign(this, { id, atServer: null }); // atServer: the text that the server has; null until it is known
    this.save = doing(error, () => this.post());
    this.saved = el("span", { class: "hint", role: "status" });
    this.input = el("textarea", {
      rows: 4,
      "aria-label": "Notes",
      maxlength: 100000,
      placeholder: "What is this run for? What did it show?",
      oninput: () => say(this.saved, "Not saved yet"),
      onchange: () => this.save()
    });
    const buttons = el("div", { class: "buttons" }, button("Save the notes", this.save), this.saved);
    this.element = section("Notes", this.input, buttons);
  }

  isChanged() {
    return this.input.value !== this.atServer;
  }

  async post() {
    if (!this.isChanged()) return;
    const text = this.input.value;
    await post(`/v1/runs/${this.id}/notes`, { text });
    this.atServer = text;
    say(this.saved, "Saved");
  }

  /** Shows the server's text, unless a person types here or has changes that are not saved. */
  show({ notes }) {
    const isFree = !this.isChanged() && document.activeElement !== this.input;
    if (this.atServer === null || isFree) this.input.value = this.atServer = notes;
  }

  leave() {
    if (this.atServer !== null && this.isChanged()) this.save();
  }
}
