// The columns of the table of runs.

import { ago, chip, count, el, lastPart, short, size, value, when } from "./dom.js";

const pair = (key, to) => `${key} ${JSON.stringify(to)}`;
let seen = new Map(); // change → how many runs have it

/** Counts how many runs have each change. */
export function countChanges(runs) {
  seen = new Map();
  for (const run of runs)
    for (const [key, to] of Object.entries(run.changed)) seen.set(pair(key, to), (seen.get(pair(key, to)) ?? 0) + 1);
}

/** What differs from the preset, as text: first what few runs have in common. */
export function changes(run) {
  const order = ([a, x], [b, y]) => seen.get(pair(a, x)) - seen.get(pair(b, y));
  const text = ([key, to]) => `${lastPart(key)} ${value(to)}`;
  return (run.changesText ??= Object.entries(run.changed).sort(order).map(text).join(", "));
}

function steps({ step, max_iters: most }) {
  return most && step < most ? [count(step), el("span", { class: "of" }, ` / ${count(most)}`)] : count(step);
}

/** Columns: [name, heading, what it is sorted by, what is shown]. Numbers have the class "number". */
export const COLUMNS = [
  ["name", "Name", run => run.name, run => el("a", { href: `#/runs/${run.id}` }, run.name)],
  ["preset", "Preset", run => run.preset, run => run.preset || "–"],
  ["changed", "Differs in", changes, run => el("span", { class: "changes", title: changes(run) }, changes(run) || "–")],
  ["dataset", "Dataset", run => run.dataset, run => run.dataset || "–"],
  ["parameters", "Parameters", run => run.parameters ?? -1, run => size(run.parameters), "number"],
  [
    "status",
    "Status",
    run => run.status,
    run => [chip(run.status), run.has_notes && el("span", { class: "note-mark", title: "has notes" }, "✎")]
  ],
  ["step", "Step", run => run.step, steps, "number"],
  ["val_bpb", "Bits/byte", run => run.val_bpb ?? Infinity, run => short(run.val_bpb), "number"],
  ["tokens_per_s", "Tokens/s", run => run.tokens_per_s ?? -1, run => size(run.tokens_per_s), "number"],
  ["started", "Started", run => run.started, run => el("time", { title: when(run.started) }, ago(run.started))]
];
export const DESCENDING_FIRST = new Set(["started", "parameters", "step", "tokens_per_s"]);
