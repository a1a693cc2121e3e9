// A first visit: from a text to a trained model and what it writes, in three steps.

import { ask, complete, get, metrics, post } from "./api.js";
import { Chart } from "./chart.js";
import { dropZone } from "./upload.js";
import { button, chip, count, doing, duration, el, isActive, say, short, writeAddress } from "./dom.js";

export const title = "Train your first model";

const VOCAB_SIZE = 1024,
  FEW_BYTES = 60_000; // less text than that has no 1,024 tokens worth a name: characters do
/** The preset "tiny", smaller: a minute or two on two cores. */
export const KEYS = {
  max_iters: 240,
  eval_interval: 40,
  log_interval: 5,
  eval_iters: 4,
  sample_length: 80,
  "checkpoints.interval": 120,
  "model_hyperparams.block_size": 128,
  "model_hyperparams.n_layer": 2,
  compile: false
};

export function mount(root) {
  let id = sessionStorage.getItem("first"),
    wrote = false,
    drawn = "",
    lines = [];
  const error = el("p", { class: "error", role: "alert" }),
    status = el("p", { class: "hint", role: "status" });
  const zone = dropZone(error, status, files => train(files));
  const example = button(
    "Use an example",
    doing(error, async () => {
      say(status, "Taking the documentation of this project …");
      const text = await (await ask("/v1/example_text")).text();
      await zone.send([new File([text], "documentation.md", { type: "text/markdown" })]);
    })
  );
  const again = button("Begin again", () => {
    sessionStorage.removeItem("first");
    id = null;
    wrote = false;
    drawn = "";
    lines = [];
    show(null);
  });
  const bring = el(
    "div",
    {},
    zone.element,
    el("p", { class: "or" }, "No text at hand? ", example, " It is the documentation of this project.")
  );
  const state = el("span"),
    facts = el("p", { class: "facts", role: "status" }),
    bar = el("progress", { max: 1, "aria-label": "Steps" });
  const curves = el("div"),
    sample = el("p", { class: "text" }),
    sampleTitle = el("h4");
  const chart = new Chart(curves, "first-chart");
  const watch = el("div", {}, facts, bar, curves, sampleTitle, sample);
  const text = el("p", { class: "text written", "aria-live": "polite" });
  const next = el("div", { class: "buttons" });
  const end = el("div", {}, el("p", {}, "This is what your model writes by itself, token by token:"), text, next);
  const step = (n, name, ...children) =>
    el(
      "li",
      { class: "stage" },
      el("h3", {}, el("span", { class: "n", "aria-hidden": "true" }, String(n)), name),
      children
    );
  const steps = [step(1, "Bring a text", bring), step(2, "Watch it learn", watch), step(3, "Read what it writes", end)];
  steps[1].querySelector("h3").append(state);
  root.append(
    el(
      "section",
      { class: "card first-visit", "aria-labelledby": "first-title" },
      el("h2", { id: "first-title" }, "Train your first model"),
      el(
        "p",
        {},
        "A language model learns to continue text from text that you give it. A small one takes a minute or two, and nothing leaves this machine."
      ),
      el("ol", { class: "stages" }, steps),
      status,
      error,
      again
    )
  );

  async function train(files) {
    say(status, "Building the dataset and the run …");
    const isShort = files.reduce((sum, file) => sum + file.bytes, 0) < FEW_BYTES;
    const dataset = await post("/v1/datasets", {
      files: files.map(file => file.id),
      name: files.length === 1 ? files[0].filename : "my text",
      ...(isShort ? { encoder: "chars" } : { vocab_size: VOCAB_SIZE })
    });
    const run = await post("/v1/fine_tuning/jobs", {
      model: "tiny",
      training_file: dataset.id,
      hyperparameters: KEYS,
      suffix: "first",
      seed: 1
    });
    id = run.id;
    sessionStorage.setItem("first", id);
    say(status, "");
    await self.refresh();
  }

  function show(details) {
    const run = details?.summary,
      done = run?.status === "succeeded";
    steps[0].classList.toggle("done", Boolean(run));
    steps[1].classList.toggle("done", done);
    bring.hidden = Boolean(run);
    watch.hidden = !run;
    end.hidden = !done;
    again.hidden = !run || isActive(run.status);
    if (!run) {
      state.replaceChildren();
      return;
    }
    state.replaceChildren(" ", chip(run.status));
    bar.value = run.max_iters ? run.step / run.max_iters : 0;
    bar.hidden = done;
    const left = run.step && run.seconds ? ((run.max_iters - run.step) * run.seconds) / run.step : 0;
    say(
      facts,
      !run.step
        ? isActive(run.status)
          ? "Turning the text into tokens, and the first step …"
          : ""
        : [
            `step ${count(run.step)} of ${count(run.max_iters)}`,
            `loss ${short(run.train_loss)}`,
            !done && left > 0 && `about ${duration(left)} left`
          ]
            .filter(Boolean)
            .join(" · ")
    );
    if (details.error) say(error, details.error);
    say(sampleTitle, details.samples.length ? `What it writes after ${count(details.samples[0].step)} steps` : "");
    say(sample, details.samples[0]?.text ?? "");
    sample.hidden = sampleTitle.hidden = !details.samples.length || done;
  }

  async function writeText(model) {
    wrote = true;
    next.replaceChildren(
      el("a", { class: "button first", href: writeAddress(model) }, "Write with it"),
      el("a", { class: "button", href: `#/runs/${id}` }, "Look at the run"),
      el("a", { class: "button", href: `#/new?from=${id}` }, "Train another, changed")
    );
    let best = "";
    for (let seed = 1; seed <= 5 && best.trim().length < 40; seed++) {
      // a text may end at once
      say(text, "");
      await complete({ model, prompt: "", max_tokens: 200, temperature: 0.7, seed }, choice => {
        text.append(choice.text);
      });
      if (text.textContent.length > best.length) best = text.textContent;
    }
    say(text, best || "It has learned to end at once. Train it longer, or on more text.");
  }

  const self = {
    async refresh() {
      if (!id) {
        show(null);
        return false;
      }
      let details;
      try {
        details = await get(`/v1/runs/${id}`);
      } catch (problem) {
        if (problem.status !== 404) throw problem;
        again.click(); // it was deleted
        return false;
      }
      show(details);
      const { summary } = details,
        now = `${summary.step} ${summary.val_loss}`;
      if (drawn !== now) {
        drawn = now;
        lines = await metrics(id, summary.step, lines);
        curves.hidden = !lines.length;
        chart.draw([{ id, name: summary.name, colour: 0, lines, flopsPerToken: summary.flops_per_token }]);
      }
      if (details.model && !wrote)
        await writeText(details.model).catch(problem => {
          wrote = false;
          throw problem;
        });
      return isActive(summary.status) || (summary.status === "succeeded" && !wrote);
    },
    leave: () => chart.leave()
  };
  return self;
}
