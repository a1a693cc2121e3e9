// The command line that repeats a run.

import { copyButton, el, say } from "./dom.js";
import { section } from "./run_section.js";

const UNKNOWN = "It is not known: the run began from a model, or an earlier version started it.";
const TO_RESUME = "With --init_from=resume it goes on from its last checkpoint.";

export class Command {
  constructor(isJob) {
    this.isJob = isJob;
    this.note = el("p", { class: "hint" });
    this.text = el("pre", { class: "command", tabindex: "0" });
    this.copy = copyButton(() => this.text.textContent);
    this.element = section("The command that repeats it", this.note, this.text, this.copy);
  }

  show({ command, summary }) {
    const canResume = summary.status === "stopped" && !this.isJob;
    say(this.text, command ?? "");
    this.text.hidden = this.copy.hidden = !command;
    say(this.note, command ? (canResume ? TO_RESUME : "") : UNKNOWN);
  }
}
