// What this browser keeps of a person's writing: the draft, the settings, and the texts that were written.

import { button, el, keep, say, when } from "./dom.js";

const MAX_TEXTS = 50;

/** What is kept under a name; `otherwise` where there is nothing. */
export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function store(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    /* the browser's room is full, or it forbids to keep anything */
  }
}

/** The list of texts that were written; onPutBack(one) shows one again. */
export class History {
  constructor(onPutBack) {
    this.onPutBack = onPutBack;
    this.list = el("ul", { class: "history" });
    this.none = el("p", { class: "hint" });
    this.forget = button("Forget all", () => this.clear(), { class: "small" });
    this.element = el("div", {}, this.none, this.list, this.forget);
    this.show();
  }

  /** Keeps the texts that one press wrote; found: [{model, seed, text}, …]. */
  add({ found, ...about }) {
    const texts = found.map(({ model, seed, text }) => ({ model, seed, text }));
    store("history", [{ time: Date.now(), ...about, texts }, ...recall("history", [])].slice(0, MAX_TEXTS));
    this.show();
  }

  clear() {
    if (!confirm("Forget all texts that this browser keeps?")) return;
    store("history", []);
    this.show();
  }

  show() {
    const found = recall("history", []);
    say(this.none, found.length ? "" : "Nothing was written yet.");
    this.forget.hidden = !found.length;
    keep(
      this.list,
      found,
      one => one.time,
      one => this.row(one)
    );
  }

  row(one) {
    const beginning = (one.prompt + one.texts[0].text).slice(0, 120) || "(an empty text)";
    const models = [...new Set(one.texts.map(text => text.model))].join(", ");
    const about = [models, `seed ${one.texts[0].seed}`, one.texts.length > 1 && `${one.texts.length} texts`];
    return el(
      "li",
      {},
      el(
        "button",
        { type: "button", title: when(one.time / 1000), onclick: () => this.onPutBack(one) },
        el("span", { class: "beginning" }, beginning),
        el("span", { class: "hint" }, about.filter(Boolean).join(" · "))
      )
    );
  }
}
