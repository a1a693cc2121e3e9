// The texts that a run writes, one at each evaluation.

import { count, el, keep, say, short } from "./dom.js";
import { section } from "./run_section.js";

function sampleItem(sample, isOpen) {
  const loss = sample.val_loss != null && el("span", { class: "hint" }, ` · validation loss ${short(sample.val_loss)}`);
  return el(
    "li",
    {},
    el(
      "details",
      { open: isOpen },
      el("summary", {}, `step ${count(sample.step)}`, loss),
      el("p", { class: "text" }, sample.text)
    )
  );
}

export class Samples {
  constructor() {
    this.none = el("p", { class: "hint" });
    this.list = el("ol", { class: "samples" });
    this.element = section("Text at each evaluation", this.none, this.list);
  }

  show({ samples }) {
    say(this.none, samples.length ? "" : "None yet. Each evaluation writes one, unless sample_length is 0.");
    keep(
      this.list,
      samples,
      sample => sample.step,
      sample => sampleItem(sample, sample === samples[0])
    );
  }
}
