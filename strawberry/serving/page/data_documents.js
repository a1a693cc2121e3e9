// The first documents of a file or a dataset.

import { get } from "./api.js";
import { el, say } from "./dom.js";

const documentItem = ({ text, is_whole }) =>
  el("li", { class: "text" }, text, !is_whole && el("span", { class: "hint" }, " …"));

/** Shows the first documents of what is at `path` when it is opened. */
export function preview(path, label = "First documents") {
  const list = el("ol", { class: "documents" });
  const note = el("p", { class: "hint" });
  const load = async () => {
    if (!details.open || list.children.length) return;
    say(note, "Reading …");
    try {
      const { data } = await get(path);
      list.replaceChildren(...data.map(documentItem));
      say(note, data.length ? "" : "There are none.");
    } catch (problem) {
      say(note, problem.message);
    }
  };
  const details = el("details", { ontoggle: load }, el("summary", {}, label), note, list);
  return details;
}
