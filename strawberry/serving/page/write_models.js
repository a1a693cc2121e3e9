// Which models write: one, and others side by side with it.

import { el, keep, offer } from "./dom.js";

export class ModelChoice {
  /** kept: the model of an earlier visit; wanted: the one that the address names, which comes first;
      onChange() is called when a person chooses another. */
  constructor(kept, wanted, onChange) {
    Object.assign(this, { kept, wanted, models: [] });
    this.select = el("select", { "aria-label": "Model", onchange: () => onChange() });
    this.others = el("div", { class: "others" });
  }

  get value() {
    return this.select.value;
  }

  /** Chooses a model, if it is there. */
  choose(name) {
    if (this.models.includes(name)) this.select.value = name;
  }

  /** The names of all models that write. */
  chosen() {
    const boxes = [...this.others.querySelectorAll("input:checked")];
    return [this.value, ...boxes.map(box => box.value).filter(name => name !== this.value)];
  }

  /** Offers the server's models, [{id, created}], and the checkpoint that the address names. Returns whether there
      are any. */
  show(data) {
    this.models = data.sort((a, b) => b.created - a.created).map(one => one.id); // the newest is the default
    const checkpoints = this.wanted && !this.models.includes(this.wanted) ? [this.wanted] : [];
    const options = names => names.map(name => [name, name]);
    const chosen = this.select.options.length ? this.value : (this.wanted ?? this.kept);
    offer(this.select, { Models: options(this.models), Checkpoints: options(checkpoints) }, chosen);
    const all = [...this.models, ...checkpoints];
    keep(
      this.others,
      all,
      name => name,
      name => el("label", { class: "check" }, el("input", { type: "checkbox", value: name }), name)
    );
    return all.length > 0;
  }
}
