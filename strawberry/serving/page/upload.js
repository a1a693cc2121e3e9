// Files on their way to the server: a place to drop them, and what is made of kinds that the server does not know.

import { upload } from "./api.js";
import { button, bytes, doing, el, many, say } from "./dom.js";

/** Sends a file. One whose ending the server does not know is sent as .txt if it is text. */
async function uploadText(file, progress, signal) {
  try {
    return await upload(file, progress, signal);
  } catch (problem) {
    if (problem.code !== "file_kind") throw problem;
    if (/\.(csv|tsv|ipynb|rtf)$/i.test(file.name))
      throw new Error(`${file.name} is text in form only: convert it to plain text or to JSON lines.`);
    if (!(await isText(file))) throw new Error(`${file.name} is not UTF-8 text: convert it to text or to JSON lines.`);
    return upload(new File([file], `${file.name}.txt`), progress, signal);
  }
}

async function isText(file) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.slice(0, 65_536).arrayBuffer(), {
      stream: true
    });
    return !text.includes("\0");
  } catch {
    return false;
  }
}

/** What takes files that are dropped on it or chosen, and sends them. `onDone(files)` gets those that are stored. */
export function dropZone(error, status, onDone) {
  let sending = null;
  const bar = el("progress", { max: 1, value: 0, "aria-label": "Upload" });
  const stop = button("Stop", () => sending?.abort(), { class: "small" });
  const input = el("input", { type: "file", multiple: true, onchange: () => send([...input.files]) });
  const zone = el(
    "label",
    { class: "drop" },
    el("strong", {}, "Drop files here, or choose them"),
    el(
      "span",
      { class: "hint" },
      "Text of any kind (.txt, .md, .py, .html, …): a document each. .json: a list of documents. .jsonl: a document a line. Each also as .gz."
    ),
    input
  );
  bar.hidden = stop.hidden = true;
  const send = doing(error, async files => {
    const stored = [],
      refused = [];
    sending = new AbortController();
    bar.hidden = stop.hidden = false;
    try {
      for (const [i, file] of files.entries()) {
        say(status, `Uploading ${file.name} (${bytes(file.size)}) …`);
        try {
          stored.push(
            await uploadText(
              file,
              share => {
                bar.value = (i + share) / files.length;
              },
              sending.signal
            )
          );
        } catch (problem) {
          if (problem.name === "AbortError" || problem.status === 401) throw problem;
          refused.push(
            files.length > 1 && !problem.message.includes(file.name)
              ? `${file.name}: ${problem.message}`
              : problem.message
          );
        }
      }
    } finally {
      sending = null;
      bar.hidden = stop.hidden = true;
      input.value = "";
      say(status, `${stored.length} of ${many(files.length, "file")} uploaded.`);
      if (stored.length) await onDone(stored);
    }
    if (refused.length) throw new Error(refused.join(" "));
  });
  const stopDefault = event => {
    event.preventDefault();
    zone.classList.toggle("over", event.type === "dragover");
  };
  for (const name of ["dragover", "dragleave"]) zone.addEventListener(name, stopDefault);
  zone.addEventListener("drop", event => {
    stopDefault(event);
    send([...event.dataTransfer.files]);
  });
  return { element: el("div", {}, zone, bar, stop), send };
}
