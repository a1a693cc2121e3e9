// What the model of a first visit writes by itself, and where to go next.

import { complete } from "./api.js";
import { el, say, writeAddress } from "./dom.js";

const MAX_TEXTS = 5, // a text may end at once: so many are tried
  FEW_CHARACTERS = 40;

export class FirstText {
  constructor() {
    this.isWritten = false;
    this.text = el("p", { class: "text written", "aria-live": "polite" });
    this.next = el("div", { class: "buttons" });
    const about = el("p", {}, "This is what your model writes by itself, token by token:");
    this.element = el("div", {}, about, this.text, this.next);
  }

  clear() {
    this.isWritten = false;
  }

  /** Writes a text with a run's model, once. */
  async write(model, id) {
    if (this.isWritten) return;
    this.isWritten = true;
    this.next.replaceChildren(
      el("a", { class: "button first", href: writeAddress(model) }, "Write with it"),
      el("a", { class: "button", href: `#/runs/${id}` }, "Look at the run"),
      el("a", { class: "button", href: `#/new?from=${id}` }, "Train another, changed")
    );
    try {
      const best = await this.writeBest(model);
      say(this.text, best || "It has learned to end at once. Train it longer, or on more text.");
    } catch (problem) {
      this.isWritten = false;
      throw problem;
    }
  }

  /** The longest of a few texts; the first that is not short. */
  async writeBest(model) {
    let best = "";
    for (let seed = 1; seed <= MAX_TEXTS && best.trim().length < FEW_CHARACTERS; seed++) {
      say(this.text, "");
      await complete({ model, prompt: "", max_tokens: 200, temperature: 0.7, seed }, choice => {
        this.text.append(choice.text);
      });
      if (this.text.textContent.length > best.length) best = this.text.textContent;
    }
    return best;
  }
}
