// The values of a new run's keys: those of its preset or model, what a person changed, and what the server computes.

import { flatten, isEqual } from "./schema.js";

export class RunValues {
  constructor() {
    this.begin({}, {});
  }

  /** base: the values of a preset or a model; changes: those that differ from it. */
  begin(base, changes) {
    this.base = base;
    this.changes = { ...changes };
    this.effective = { ...base };
  }

  isChanged(key) {
    return key in this.changes;
  }

  get changedCount() {
    return Object.keys(this.changes).length;
  }

  /** The value before any change; null where there is none. */
  original(key) {
    return this.base[key] ?? null;
  }

  current(key) {
    return this.isChanged(key) ? this.changes[key] : this.effective[key];
  }

  /** Changes a key; undefined puts it back. */
  change(key, to) {
    if (to === undefined || isEqual(to, this.original(key))) delete this.changes[key];
    else this.changes[key] = to;
  }

  putBack(key) {
    delete this.changes[key];
  }

  /** Takes all changes from nested or dotted keys, without those that the server sets. Returns the seed among them. */
  replace(given, serverKeys) {
    const isChange = ([key, to]) =>
      key !== "$schema" && !serverKeys.includes(key) && !(key in this.base && isEqual(to, this.base[key]));
    const { seed, ...changes } = Object.fromEntries(Object.entries(flatten(given)).filter(isChange));
    this.changes = changes;
    return seed;
  }

  /** Takes the values that the server computed for keys that are left to it. */
  complete(computed) {
    this.effective = { ...this.base, ...computed };
    if (this.effective.lr_decay_iters === this.effective.max_iters) this.effective.lr_decay_iters = null;
  }
}
