// What a run will cost, as the server estimates it.

import { bytes, duration, el, say, size } from "./dom.js";

/** 1.9e11 as "190 GFLOP". */
const flop = n => `${size(n).replace(/[A-Z]$/, letter => ` ${letter === "B" ? "G" : letter}`)}FLOP`;

function stepTime(seconds) {
  if (!seconds) return "not known yet";
  return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : duration(seconds);
}

/** [name, text] of each number. */
function facts(e) {
  return [
    ["Parameters", `${size(e.parameters)}, ${size(e.parameters_without_embeddings)} without embeddings`],
    ["Memory, about", bytes(e.memory)],
    ["Tokens a step", size(e.tokens_per_step)],
    ["Tokens in all", size(e.tokens)],
    ["Compute", flop(e.flops)],
    ["A step", stepTime(e.seconds_per_step)],
    ["All steps", e.seconds ? `about ${duration(e.seconds)}` : "not known yet"]
  ];
}

/** Where the time comes from. */
function source(known) {
  if (!known) return ["No run here is like it, so that its time is not known."];
  const how = known.is_alike ? " takes it, which has the same model and batch" : ", by its FLOP/s";
  const link = el("a", { href: `#/runs/${known.run}` }, known.name);
  return ["Time as ", link, how, known.device ? `, on ${known.device}.` : "."];
}

export class CostPanel {
  constructor() {
    this.numbers = el("dl", { class: "numbers cost" });
    this.note = el("p", { class: "hint" }, "Counting …");
    this.error = el("p", { class: "error", role: "status" });
    this.warnings = el("div", { role: "status" });
    this.element = el("div", {}, this.numbers, this.note, this.error, this.warnings);
  }

  show(estimate) {
    const rows = facts(estimate).map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)));
    this.numbers.replaceChildren(...rows);
    const parts = Object.entries(estimate.memory_parts).map(([name, n]) => `${name} ${bytes(n)}`);
    this.note.replaceChildren(`Memory in float32: ${parts.join(", ")}. `, ...source(estimate.known_from));
    this.warnings.replaceChildren(...estimate.warnings.map(text => el("p", { class: "warning" }, text)));
  }

  /** Says why there is no estimate; "" where there is one again. */
  fail(text) {
    say(this.error, text);
    this.numbers.classList.toggle("stale", text !== "");
  }
}
