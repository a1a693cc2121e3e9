// A part of the page of a run, under its name.

import { el } from "./dom.js";

export const section = (name, ...children) =>
  el("section", { class: "card", "aria-label": name }, el("h3", {}, name), children);

/** A table that scrolls by itself where there is little room. Only a screen reader reads its caption. */
export const table = (kind, caption, ...rows) =>
  el("div", { class: "scroll" }, el("table", { class: kind }, el("caption", { class: "unseen" }, caption), rows));
