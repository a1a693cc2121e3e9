// The top of the page of a run: its name, state, progress and numbers, errors and messages.

import { ago, bytes, chip, count, duration, el, say, short, size } from "./dom.js";

/** Seconds until the last step; 0 where they are not known. */
export function secondsLeft({ status, step, seconds, max_iters: most }) {
  return status === "running" && step && seconds ? ((most - step) * seconds) / step : 0;
}

function speed({ tokens_per_s: rate, device }) {
  return rate != null && `${size(rate)} tokens/s${device ? ` on ${device}` : ""}`;
}

/** The numbers of a run in one line. */
function facts(summary, diskBytes, isJob) {
  const { step, max_iters: most } = summary,
    left = secondsLeft(summary);
  return [
    `${summary.preset || "its own config"} on ${summary.dataset || "unknown data"}`,
    `step ${count(step)}${most ? ` of ${count(most)}` : ""}`,
    left > 0 && `about ${duration(left)} left`,
    summary.val_bpb != null && `${short(summary.val_bpb)} bits per byte in validation`,
    summary.train_loss != null && `loss ${short(summary.train_loss)}`,
    speed(summary),
    summary.parameters && `${size(summary.parameters)} parameters`,
    summary.tokens && `${size(summary.tokens)} tokens seen`,
    summary.seconds && `${duration(summary.seconds)} in steps`,
    `started ${ago(summary.started)} ${isJob ? "here" : "from the command line"}`,
    `${bytes(diskBytes)} on disk`
  ]
    .filter(Boolean)
    .join(" · ");
}

export class RunHead {
  constructor(isJob) {
    this.isJob = isJob;
    this.heading = el("h2", { tabindex: "-1" });
    this.state = el("span");
    this.bar = el("progress", { max: 1, "aria-label": "Steps" });
    this.facts = el("p", { class: "facts" });
    this.error = el("p", { class: "error", role: "alert" });
    this.status = el("p", { class: "unseen", role: "status" });
    this.element = el(
      "div",
      { class: "card top" },
      el("p", { class: "crumb" }, el("a", { href: "#/runs" }, "Runs")),
      el("div", { class: "bar" }, this.heading, this.state),
      this.bar,
      this.facts,
      this.error,
      this.status
    );
  }

  show({ summary, bytes: diskBytes, error }) {
    say(this.heading, summary.name);
    document.title = `${summary.name} · Strawberry`;
    this.showState(summary.status);
    this.showProgress(summary);
    say(this.facts, facts(summary, diskBytes, this.isJob));
    if (error) say(this.error, error);
  }

  showState(status) {
    if (this.state.dataset.status === status) return;
    this.state.dataset.status = status;
    this.state.replaceChildren(chip(status));
  }

  showProgress({ status, step, max_iters: most }) {
    this.bar.hidden = !most || status === "succeeded";
    this.bar.value = most ? step / most : 0;
  }
}
