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

/** What takes files that are dropped on it or chosen, and sends them. */
export class DropZone {
  /** error, status: the elements that show what happens; onDone(files) gets those that are stored. */
  constructor(error, status, onDone) {
    Object.assign(this, { status, onDone, sending: null });
    this.bar = el("progress", { max: 1, value: 0, "aria-label": "Upload" });
    this.stop = button("Stop", () => this.sending?.abort(), { class: "small" });
    this.send = doing(error, files => this.sendAll(files));
    this.input = el("input", { type: "file", multiple: true, onchange: () => this.send([...this.input.files]) });
    this.zone = this.makeZone();
    this.element = el("div", {}, this.zone, this.bar, this.stop);
    this.bar.hidden = this.stop.hidden = true;
  }

  makeZone() {
    const onDrag = event => {
      event.preventDefault();
      this.zone.classList.toggle("over", event.type === "dragover");
    };
    const onDrop = event => {
      onDrag(event);
      this.send([...event.dataTransfer.files]);
    };
    return el(
      "label",
      { class: "drop", ondragover: onDrag, ondragleave: onDrag, ondrop: onDrop },
      el("strong", {}, "Drop files here, or choose them"),
      el(
        "span",
        { class: "hint" },
        "Text of any kind (.txt, .md, .py, .html, …): a document each. .json: a list of documents. .jsonl: a document a line. Each also as .gz."
      ),
      this.input
    );
  }

  /** Sends files one after another. Those that are refused do not keep the others back. */
  async sendAll(files) {
    const stored = [],
      refused = [];
    this.sending = new AbortController();
    this.bar.hidden = this.stop.hidden = false;
    try {
      for (const [i, file] of files.entries()) {
        say(this.status, `Uploading ${file.name} (${bytes(file.size)}) …`);
        const progress = share => {
          this.bar.value = (i + share) / files.length;
        };
        try {
          stored.push(await uploadText(file, progress, this.sending.signal));
        } catch (problem) {
          if (problem.name === "AbortError" || problem.status === 401) throw problem;
          const isNamed = files.length === 1 || problem.message.includes(file.name);
          refused.push(isNamed ? problem.message : `${file.name}: ${problem.message}`);
        }
      }
    } finally {
      await this.end(files, stored);
    }
    if (refused.length) throw new Error(refused.join(" "));
  }

  async end(files, stored) {
    this.sending = null;
    this.bar.hidden = this.stop.hidden = true;
    this.input.value = "";
    say(this.status, `${stored.length} of ${many(files.length, "file")} uploaded.`);
    if (stored.length) await this.onDone(stored);
  }
}
