// The changed keys of a new run as JSON, to copy and to paste.

import { el, field, say } from "./dom.js";
import { nest } from "./schema.js";

function readObject(text) {
  const given = JSON.parse(text.trim() || "{}");
  if (given === null || typeof given !== "object" || Array.isArray(given)) throw new Error("it is no object, { … }");
  return given;
}

export class JsonView {
  /** onRead(object) gets what a person typed, if it is a JSON object. */
  constructor(onRead) {
    this.onRead = onRead;
    this.text = el("textarea", { class: "code", rows: 10, spellcheck: "false", oninput: () => this.read() });
    this.error = el("p", { class: "error", role: "alert" });
    this.element = el(
      "details",
      {},
      el("summary", {}, "As JSON, to copy and paste"),
      field("The keys that differ", this.text, "Nested or dotted. What is pasted here fills the form."),
      this.error
    );
  }

  /** Shows the changes, dotted key → value, unless a person is typing here. */
  show(changes) {
    if (document.activeElement !== this.text)
      this.text.value = Object.keys(changes).length ? JSON.stringify(nest(changes), null, 2) : "{}";
    this.showProblem("");
  }

  read() {
    try {
      this.onRead(readObject(this.text.value));
      this.showProblem("");
    } catch (problem) {
      this.showProblem(`This is not JSON yet: ${problem.message}`);
    }
  }

  showProblem(text) {
    if (text) this.text.setAttribute("aria-invalid", "true");
    else this.text.removeAttribute("aria-invalid");
    say(this.error, text);
  }
}
