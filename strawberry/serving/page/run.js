// One run: its curves, texts, keys, checkpoints, events and notes, and what can be done with it.

import { ask, download, get, metrics, post, remove } from "./api.js";
import { Chart } from "./chart.js";
import {
  ago,
  button,
  bytes,
  chip,
  copyButton,
  count,
  doing,
  duration,
  el,
  isActive,
  keep,
  many,
  say,
  short,
  size,
  value,
  when
} from "./dom.js";

export const title = "Run";

export function mount(root, { id }) {
  const job = id.startsWith("ftjob-");
  let details = null,
    drawn = "",
    lines = [],
    notesAtServer = null;
  const error = el("p", { class: "error", role: "alert" }),
    status = el("p", { class: "unseen", role: "status" });
  const heading = el("h2", { tabindex: "-1" }),
    state = el("span"),
    facts = el("p", { class: "facts" });
  const bar = el("progress", { max: 1, "aria-label": "Steps" });
  const actions = el("div", { class: "buttons" });
  const loading = el("p", { class: "loading" }, "Loading the run …");
  const page = el("div", { class: "run-page" });
  page.hidden = true;
  root.append(loading, page);

  // ---- what can be done ----

  /** A button that asks the server; `after` follows. */
  const act = (name, text, path, done) => {
    const element = button(
      text,
      doing(error, async () => {
        say(status, done);
        try {
          await ask(path, { method: "POST" });
        } finally {
          await self.refresh();
        }
        if (element.hidden) heading.focus();
      }),
      { "data-act": name }
    );
    return element;
  };
  const jobs = `/v1/fine_tuning/jobs/${id}`;
  const pause = act("pause", "Pause", `${jobs}/pause`, "Saving, to pause.");
  const resume = act("resume", "Resume", `${jobs}/resume`, "Resuming.");
  const stop = act("stop", "Stop", job ? `${jobs}/cancel` : `/v1/runs/${id}/stop`, "Saving, to stop.");
  const duplicate = el("a", { class: "button", href: `#/new?from=${id}` }, "Duplicate with changes");
  const writeWith = el("a", { class: "button first" }, "Write with it");
  const erase = button(
    "Delete",
    doing(error, async () => {
      const stays = details.model ? ` Its model ${details.model} stays.` : "";
      if (!confirm(`Delete the run ${details.summary.name}? Its checkpoints, curves, events and notes go.${stays}`))
        return;
      await remove(job ? jobs : `/v1/runs/${id}`);
      location.hash = "#/runs";
    }),
    { class: "danger" }
  );
  actions.append(writeWith, pause, resume, stop, duplicate, erase);

  // ---- sections ----

  const curves = el("section", { class: "card", "aria-label": "Curves" }, el("h3", {}, "Curves"));
  const chart = new Chart(curves, "run-chart");
  const samples = el("ol", { class: "samples" }),
    noSamples = el("p", { class: "hint" });
  const checkpoints = el("tbody"),
    noCheckpoints = el("p", { class: "hint" });
  const events = el("ul", { class: "events", tabindex: "0", "aria-label": "Events, newest first" });
  const command = el("pre", { class: "command", tabindex: "0" }),
    noCommand = el("p", { class: "hint" });
  const onlyChanged = el("input", { type: "checkbox", checked: true, onchange: () => showKeys() });
  const keys = el("tbody");
  const keysCount = el("p", { class: "hint", role: "status" });

  const notes = el("textarea", {
    rows: 4,
    "aria-label": "Notes",
    maxlength: 100000,
    placeholder: "What is this run for? What did it show?",
    oninput: () => say(saved, "Not saved yet"),
    onchange: () => keepNotes()
  });
  const saved = el("span", { class: "hint", role: "status" });
  const keepNotes = doing(error, async () => {
    if (notes.value === notesAtServer) return;
    const text = notes.value;
    await post(`/v1/runs/${id}/notes`, { text });
    notesAtServer = text;
    say(saved, "Saved");
  });

  const copy = copyButton(() => command.textContent);
  const section = (name, ...children) =>
    el("section", { class: "card", "aria-label": name }, el("h3", {}, name), children);
  page.append(
    el(
      "div",
      { class: "card top" },
      el("p", { class: "crumb" }, el("a", { href: "#/runs" }, "Runs")),
      el("div", { class: "bar" }, heading, state),
      bar,
      facts,
      error,
      status,
      actions
    ),
    curves,
    el(
      "div",
      { class: "columns" },
      el(
        "div",
        {},
        section("Text at each evaluation", noSamples, samples),
        section(
          "Checkpoints",
          noCheckpoints,
          el(
            "div",
            { class: "scroll" },
            el("table", { class: "plain" }, el("caption", { class: "unseen" }, "Checkpoints"), checkpoints)
          )
        ),
        section("Events", events)
      ),
      el(
        "div",
        {},
        section("Notes", notes, el("div", { class: "buttons" }, button("Save the notes", keepNotes), saved)),
        section("The command that repeats it", noCommand, command, copy),
        section(
          "Keys",
          el("label", { class: "check" }, onlyChanged, "only those that differ from the preset"),
          keysCount,
          el(
            "div",
            { class: "scroll" },
            el(
              "table",
              { class: "keys" },
              el("caption", { class: "unseen" }, "Keys"),
              el(
                "thead",
                {},
                el(
                  "tr",
                  {},
                  ["Key", "This run", "Preset"].map(name => el("th", { scope: "col" }, name))
                )
              ),
              keys
            )
          )
        )
      )
    )
  );

  function showHead() {
    const { summary } = details,
      { step, max_iters: most } = summary;
    say(heading, summary.name);
    document.title = `${summary.name} · Strawberry`;
    if (state.dataset.status !== summary.status) {
      state.dataset.status = summary.status;
      state.replaceChildren(chip(summary.status));
    }
    bar.hidden = !most || summary.status === "succeeded";
    bar.value = most ? step / most : 0;
    const left = summary.status === "running" && step && summary.seconds ? ((most - step) * summary.seconds) / step : 0;
    say(
      facts,
      [
        `${summary.preset || "its own config"} on ${summary.dataset || "unknown data"}`,
        `step ${count(step)}${most ? ` of ${count(most)}` : ""}`,
        left > 0 && `about ${duration(left)} left`,
        summary.val_bpb != null && `${short(summary.val_bpb)} bits per byte in validation`,
        summary.train_loss != null && `loss ${short(summary.train_loss)}`,
        summary.tokens_per_s != null &&
          `${size(summary.tokens_per_s)} tokens/s${summary.device ? ` on ${summary.device}` : ""}`,
        summary.parameters && `${size(summary.parameters)} parameters`,
        summary.tokens && `${size(summary.tokens)} tokens seen`,
        summary.seconds && `${duration(summary.seconds)} in steps`,
        `started ${ago(summary.started)} ${job ? "here" : "from the command line"}`,
        `${bytes(details.bytes)} on disk`
      ]
        .filter(Boolean)
        .join(" · ")
    );
    if (details.error) say(error, details.error);
    const now = summary.status,
      at = document.activeElement;
    pause.hidden = !job || !isActive(now);
    resume.hidden = !job || !["paused", "cancelled", "failed"].includes(now);
    stop.hidden = !(isActive(now) || (job && now === "paused"));
    erase.hidden = now === "running";
    const writer = details.model ?? details.checkpoints[0]?.model;
    writeWith.hidden = !writer;
    if (writer) writeWith.href = `#/write?model=${encodeURIComponent(writer)}`;
    if (actions.contains(at) && at.hidden) heading.focus();
  }

  function showSamples() {
    say(noSamples, details.samples.length ? "" : "None yet. Each evaluation writes one, unless sample_length is 0.");
    keep(
      samples,
      details.samples,
      sample => sample.step,
      sample =>
        el(
          "li",
          {},
          el(
            "details",
            { open: sample === details.samples[0] },
            el(
              "summary",
              {},
              `step ${count(sample.step)}`,
              sample.val_loss != null && el("span", { class: "hint" }, ` · validation loss ${short(sample.val_loss)}`)
            ),
            el("p", { class: "text" }, sample.text)
          )
        )
    );
  }

  function showCheckpoints() {
    const found = details.checkpoints,
      best = Math.min(...found.map(c => c.val_loss ?? Infinity));
    say(noCheckpoints, found.length ? "" : "None yet.");
    keep(
      checkpoints,
      found,
      c => c.step,
      c =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, `step ${count(c.step)}`),
          el(
            "td",
            {},
            c.val_loss == null ? "not evaluated" : `loss ${short(c.val_loss)}`,
            el("span", { class: "best" })
          ),
          el("td", {}, el("time", { title: when(c.saved_at) }, ago(c.saved_at))),
          el(
            "td",
            {},
            el(
              "div",
              { class: "buttons" },
              el(
                "a",
                { class: "button small", href: `#/write?model=${encodeURIComponent(c.model)}` },
                "Write with it",
                el("span", { class: "unseen" }, ` (step ${c.step})`)
              ),
              button(
                [`Download`, el("span", { class: "unseen" }, ` step ${c.step}`)],
                doing(error, () => download(`/v1/runs/${id}/checkpoints/${c.step}`, c.model)),
                { class: "small", title: bytes(c.bytes) }
              )
            )
          )
        ),
      (row, c) => say(row.querySelector(".best"), c.val_loss === best && found.length > 1 ? " best" : "")
    );
  }

  function showKeys() {
    const { values, preset_values: preset } = details,
      same = key =>
        JSON.stringify(values[key]) === JSON.stringify(preset[key]) ||
        (preset[key] === "auto" && !(key in details.summary.changed)) || // what train.py made of it
        (key === "lr_decay_iters" && [values, preset].every(one => one[key] === one.max_iters)); // it was not set
    const all = Object.keys(values).sort(),
      differ = all.filter(key => !same(key) && key !== "seed");
    const known = Object.keys(preset).length > 0;
    const shown = onlyChanged.checked && known ? differ : all;
    say(
      keysCount,
      known
        ? `${many(differ.length, "key")} of ${all.length} differ${differ.length === 1 ? "s" : ""} from ${details.summary.preset}.`
        : `What it began with, ${details.summary.preset || "its config"}, is not there any more.`
    );
    keep(
      keys,
      shown,
      key => key,
      key => el("tr", {}, el("th", { scope: "row" }, key), el("td"), el("td")),
      (row, key) => {
        row.classList.toggle("changed", !same(key) && known);
        say(row.children[1], value(values[key]));
        say(row.children[2], key in preset ? value(preset[key]) : "–");
      }
    );
  }

  const self = {
    async refresh() {
      try {
        details = await get(`/v1/runs/${id}`);
      } catch (problem) {
        if (page.hidden || problem.status === 404) {
          page.hidden = true;
          loading.hidden = false;
          loading.replaceChildren(
            problem.status === 401 ? "" : problem.message,
            " ",
            el("a", { href: "#/runs" }, "All runs")
          );
          if (problem.status === 404) return false;
        }
        throw problem;
      }
      loading.hidden = true;
      page.hidden = false;
      const { summary } = details;
      showHead();
      showSamples();
      showCheckpoints();
      showKeys();
      say(command, details.command ?? "");
      command.hidden = copy.hidden = !details.command;
      say(
        noCommand,
        details.command
          ? summary.status === "stopped" && !job
            ? "With --init_from=resume it goes on from its last checkpoint."
            : ""
          : "It is not known: the run began from a model, or an earlier version started it."
      );
      keep(
        events,
        details.events.map((event, i) => ({ ...event, key: details.events.length - i })),
        event => `${event.key} ${event.message}`,
        event => el("li", { "data-level": event.level }, event.message)
      );
      if (notesAtServer === null || (notes.value === notesAtServer && document.activeElement !== notes))
        notes.value = notesAtServer = details.notes;
      const now = `${summary.step} ${summary.val_loss} ${summary.status}`;
      if (drawn !== now) {
        drawn = now;
        lines = await metrics(id, summary.step, lines);
        chart.draw([{ id, name: summary.name, colour: 0, lines, flopsPerToken: summary.flops_per_token }]);
      }
      return isActive(summary.status);
    },
    leave: () => {
      chart.leave();
      if (notesAtServer !== null && notes.value !== notesAtServer) keepNotes();
    }
  };
  return self;
}
