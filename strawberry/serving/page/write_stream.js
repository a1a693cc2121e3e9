// The texts that one press of "Write" asks for, as they come from the server.

import { complete } from "./api.js";
import { count } from "./dom.js";

const REASONS = { stop: "it came to its end", length: "it has the most tokens that it may" };

export class Stream {
  /** names: the models; each writes n texts, the first with `seed`, each other with the next. */
  constructor(names, n, seed) {
    Object.assign(this, { names, n, seed, texts: [], problems: [], tokens: 0 });
    this.isSingle = names.length * n === 1;
    this.controller = new AbortController();
  }

  stop() {
    this.controller.abort();
  }

  get isStopped() {
    return this.controller.signal.aborted;
  }

  /** Asks all models at once. makeText(model, seed) → the Continuation that shows a text. */
  async run(options, makeText) {
    const began = performance.now();
    await Promise.all(this.names.map(name => this.ask(name, options, makeText)));
    for (const text of this.texts) text.finish();
    this.seconds = (performance.now() - began) / 1000;
  }

  async ask(model, options, makeText) {
    const { seed, n } = this;
    const texts = Array.from({ length: n }, (_, i) => makeText(model, seed + i));
    this.texts.push(...texts);
    const show = piece => texts[piece.index]?.add(piece);
    try {
      const usage = await complete({ ...options, model, seed, n }, show, this.controller.signal);
      this.tokens += usage?.completion_tokens ?? 0;
    } catch (problem) {
      this.problems.push([model, problem]);
    }
  }

  /** How it ended, how fast it was, and the seeds. */
  statusText() {
    const { seed, n, seconds } = this;
    if (this.isStopped) return `Stopped. Seed ${seed}.`;
    if (this.problems.length === this.names.length) return "";
    const reasons = new Set(this.texts.map(text => REASONS[text.reason]).filter(Boolean));
    const speed = `${count(this.tokens)} tokens in ${seconds.toFixed(1)} s, ${count(Math.round(this.tokens / seconds))} tokens/s`;
    const seeds = n > 1 ? `${seed} to ${seed + n - 1}` : seed;
    return `${speed}; seed ${seeds}${reasons.size === 1 ? `; ${[...reasons][0]}` : ""}.`;
  }

  /** Throws what went wrong, with the model's name where there are several. */
  throwProblems() {
    const real = this.problems.filter(([, problem]) => problem.name !== "AbortError");
    const text = ([name, { message }]) => (this.names.length > 1 ? `${name}: ${message}` : message);
    if (real.length) throw new Error(real.map(text).join(" "));
  }
}
