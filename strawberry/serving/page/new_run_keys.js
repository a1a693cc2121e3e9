// The form of a new run's keys: groups of fields, and a filter of them.

import { el, lastPart, say } from "./dom.js";
import { KeyRow } from "./new_run_row.js";

const GROUPS = [
  // [title, whether it is open, keys or the beginning of keys]
  [
    "Length and learning rate",
    true,
    [
      "max_iters",
      "batch_size",
      "gradient_accumulation_steps",
      "learning_rate",
      "warmup_iters",
      "min_lr",
      "cooldown_frac",
      "lr_decay_iters",
      "decay_lr",
      "grad_clip"
    ]
  ],
  ["Model", true, ["model_hyperparams."]],
  ["Optimizer", false, ["optimizer_hyperparams."]],
  [
    "Evaluations and checkpoints",
    false,
    ["eval_interval", "eval_iters", "log_interval", "sample_length", "sample_prompt", "checkpoints."]
  ],
  ["Everything else", false, [""]]
];
const FIRST_MODEL_KEYS = ["arch", "n_layer", "n_embd", "n_head", "block_size", "vocab_size"];

const belongs = (key, beginning) =>
  beginning === "" || key === beginning || (beginning.endsWith(".") && key.startsWith(beginning));

function orderModelKeys(keys) {
  const first = FIRST_MODEL_KEYS.map(key => `model_hyperparams.${key}`).filter(key => keys.includes(key));
  return [...first, ...keys.filter(key => !FIRST_MODEL_KEYS.includes(lastPart(key)))];
}

/** [title, whether it is open, keys] of each group that has keys; a key is in the first group that fits. */
function divide(keys) {
  const left = new Set(keys);
  return GROUPS.map(([title, isOpen, beginnings]) => {
    const own = beginnings.flatMap(beginning => [...left].filter(key => belongs(key, beginning)));
    for (const key of own) left.delete(key);
    return [title, isOpen, title === "Model" ? orderModelKeys(own) : own];
  }).filter(([, , own]) => own.length);
}

export class KeyForm {
  /** onChange(key, text) gets what is typed; onPutBack(key) undoes a change. */
  constructor(onChange, onPutBack) {
    this.onChange = onChange;
    this.onPutBack = onPutBack;
    this.rows = new Map();
    this.values = null;
    this.filter = el("input", {
      type: "search",
      placeholder: "Find a key or a word of its meaning",
      "aria-label": "Find a key",
      oninput: () => this.showFilter()
    });
    this.onlyChanged = el("input", { type: "checkbox", onchange: () => this.showFilter() });
    this.bar = el(
      "div",
      { class: "bar" },
      el("h2", {}, "Keys"),
      this.filter,
      el("label", { class: "check" }, this.onlyChanged, "only changed ones")
    );
    this.groups = el("div", { class: "groups" });
  }

  /** Makes every field anew. schemas: key → its schema; values: the RunValues to show. */
  build(schemas, values) {
    this.schemas = schemas;
    this.values = values;
    this.rows.clear();
    this.groups.replaceChildren(...divide(schemas.keys()).map(group => this.group(...group)));
  }

  group(title, isOpen, keys) {
    const isRare = key => key.includes("rope_scaling.");
    const usual = this.fields(keys.filter(key => !isRare(key)));
    const rare = keys.filter(isRare);
    return el(
      "details",
      { class: "group", open: isOpen },
      el("summary", {}, title, el("span", { class: "changes-count" })),
      usual,
      rare.length > 0 &&
        el(
          "details",
          {},
          el("summary", {}, "rope_scaling: a longer context than it was trained for"),
          this.fields(rare)
        )
    );
  }

  fields(keys) {
    const rows = keys.map(key => new KeyRow(key, this.schemas.get(key), this.onChange, this.onPutBack));
    for (const row of rows) this.rows.set(row.key, row);
    return el(
      "div",
      { class: "fields wide" },
      rows.map(row => row.element)
    );
  }

  showValues() {
    for (const row of this.rows.values()) row.show(this.values);
  }

  /** Shows that a key is changed, and leaves its text as it is typed. */
  showMark(key) {
    this.rows.get(key).showMark(this.values);
  }

  /** Shows how many keys of each group are changed. */
  showCounts() {
    for (const group of this.groups.children) {
      const n = group.querySelectorAll(".field.changed").length;
      say(group.querySelector(".changes-count"), n ? ` ${n} changed` : "");
    }
  }

  showFilter() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const onlyChanged = this.onlyChanged.checked;
    for (const row of this.rows.values()) row.showIf(words, !onlyChanged || this.values.isChanged(row.key));
    for (const group of this.groups.querySelectorAll("details")) {
      const any = [...group.querySelectorAll(".field")].some(field => !field.hidden);
      group.hidden = !any;
      if (words.length || onlyChanged) group.open = any;
    }
  }

  /** Marks the keys that the server's message names; "" marks none. */
  showProblems(text) {
    for (const row of this.rows.values()) row.showProblem(text);
  }
}
