// The keys of a run's config beside those of its preset.

import { el, keep, many, say, value } from "./dom.js";
import { section, table } from "./run_section.js";
import { isEqual } from "./schema.js";

/** Whether a key has the preset's value, or one that train.py derived from the preset. */
function isSame(key, { values, preset_values: preset, summary }) {
  return (
    isEqual(values[key], preset[key]) ||
    (preset[key] === "auto" && !(key in summary.changed)) || // what train.py made of it
    (key === "lr_decay_iters" && [values, preset].every(one => one[key] === one.max_iters)) // it was not set
  );
}

const hasPreset = details => Object.keys(details.preset_values).length > 0;

function countText(differ, all, details) {
  const { preset } = details.summary;
  if (!hasPreset(details)) return `What it began with, ${preset || "its config"}, is not there any more.`;
  return `${many(differ, "key")} of ${all} differ${differ === 1 ? "s" : ""} from ${preset}.`;
}

const headRow = () =>
  el(
    "tr",
    {},
    ["Key", "This run", "Preset"].map(name => el("th", { scope: "col" }, name))
  );

export class Keys {
  constructor() {
    this.details = null;
    this.onlyChanged = el("input", { type: "checkbox", checked: true, onchange: () => this.show(this.details) });
    this.count = el("p", { class: "hint", role: "status" });
    this.rows = el("tbody");
    this.element = section(
      "Keys",
      el("label", { class: "check" }, this.onlyChanged, "only those that differ from the preset"),
      this.count,
      table("keys", "Keys", el("thead", {}, headRow()), this.rows)
    );
  }

  show(details) {
    this.details = details;
    const all = Object.keys(details.values).sort(),
      differ = all.filter(key => !isSame(key, details) && key !== "seed");
    say(this.count, countText(differ.length, all.length, details));
    keep(
      this.rows,
      this.onlyChanged.checked && hasPreset(details) ? differ : all,
      key => key,
      key => el("tr", {}, el("th", { scope: "row" }, key), el("td"), el("td")),
      (row, key) => this.showRow(row, key)
    );
  }

  showRow(row, key) {
    const { values, preset_values: preset } = this.details;
    row.classList.toggle("changed", !isSame(key, this.details) && hasPreset(this.details));
    say(row.children[1], value(values[key]));
    say(row.children[2], key in preset ? value(preset[key]) : "–");
  }
}
