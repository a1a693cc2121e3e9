// Asks the server what a new run will cost, once its keys have not changed for a moment.

import { post } from "./api.js";

const WAIT = 400; // ms

export class Estimator {
  /** options() → the request; onEstimate(estimate) and onProblem(text) get the answer. */
  constructor(options, onEstimate, onProblem) {
    this.options = options;
    this.onEstimate = onEstimate;
    this.onProblem = onProblem;
    this.timer = null;
    this.request = null;
  }

  /** Asks after `wait` ms, instead of what was asked before. */
  ask(wait = WAIT) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.send(), wait);
  }

  async send() {
    this.request?.abort();
    this.request = new AbortController();
    try {
      this.onEstimate(await post("/v1/fine_tuning/estimates", this.options(), this.request.signal));
    } catch (problem) {
      if (problem.name !== "AbortError") this.onProblem(problem.message);
    }
  }

  stop() {
    clearTimeout(this.timer);
    this.request?.abort();
  }
}
