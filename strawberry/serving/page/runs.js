// The table of runs, and the curves of those that are chosen.

import { get, metrics } from "./api.js";
import { Chart } from "./chart.js";
import { ago, chip, count, el, empty, isActive, keep, lastPart, many, say, short, size, value, when } from "./dom.js";

export const title = "Runs";

/** What differs from the preset, as text: first what few runs have in common. */
const changes = run =>
  (run.changesText ??= (() => {
    const order = Object.entries(run.changed).sort(([a, x], [b, y]) => seen.get(pair(a, x)) - seen.get(pair(b, y)));
    return order.map(([key, to]) => `${lastPart(key)} ${value(to)}`).join(", ");
  })());
const pair = (key, to) => `${key} ${JSON.stringify(to)}`;
let seen = new Map(); // change → how many runs have it

function compare(runs) {
  seen = new Map();
  for (const run of runs)
    for (const [key, to] of Object.entries(run.changed)) seen.set(pair(key, to), (seen.get(pair(key, to)) ?? 0) + 1);
}
/** Columns: [name, heading, what it is sorted by, what is shown]. Numbers have the class "number". */
const COLUMNS = [
  ["name", "Name", run => run.name, run => el("a", { href: `#/runs/${run.id}` }, run.name)],
  ["preset", "Preset", run => run.preset, run => run.preset || "–"],
  ["changed", "Differs in", changes, run => el("span", { class: "changes", title: changes(run) }, changes(run) || "–")],
  ["dataset", "Dataset", run => run.dataset, run => run.dataset || "–"],
  ["parameters", "Parameters", run => run.parameters ?? -1, run => size(run.parameters), "number"],
  [
    "status",
    "Status",
    run => run.status,
    run => [chip(run.status), run.has_notes && el("span", { class: "note-mark", title: "has notes" }, "✎")]
  ],
  [
    "step",
    "Step",
    run => run.step,
    run =>
      run.max_iters && run.step < run.max_iters
        ? [count(run.step), el("span", { class: "of" }, ` / ${count(run.max_iters)}`)]
        : count(run.step),
    "number"
  ],
  ["val_bpb", "Bits/byte", run => run.val_bpb ?? Infinity, run => short(run.val_bpb), "number"],
  ["tokens_per_s", "Tokens/s", run => run.tokens_per_s ?? -1, run => size(run.tokens_per_s), "number"],
  ["started", "Started", run => run.started, run => el("time", { title: when(run.started) }, ago(run.started))]
];
const MAX_AT_ONCE = 24; // runs that one press chooses: a chart of more shows nothing
const DESCENDING_FIRST = new Set(["started", "parameters", "step", "tokens_per_s"]);

const stored = JSON.parse(sessionStorage.getItem("runs") ?? "null");
const state = {
  chosen: new Map(stored?.chosen ?? []),
  sort: stored?.sort ?? "started",
  down: stored?.down ?? true,
  filter: "",
  wasChosen: stored !== null
};
const store = () =>
  sessionStorage.setItem("runs", JSON.stringify({ chosen: [...state.chosen], sort: state.sort, down: state.down }));

/** Chooses a run, with the first colour that no other chosen run has. */
function choose(id, is) {
  if (!is) state.chosen.delete(id);
  else if (!state.chosen.has(id)) {
    const taken = new Set(state.chosen.values());
    let colour = 0;
    while (taken.has(colour)) colour++;
    state.chosen.set(id, colour);
  }
  state.wasChosen = true;
  store();
}

export function mount(root) {
  let all = null;
  const lines = new Map(); // id → {step, lines}
  const summary = el("p", { class: "hint", role: "status" });
  const filter = el("input", {
    type: "search",
    placeholder: "Filter by name, preset, key, dataset, status",
    "aria-label": "Filter the runs",
    value: state.filter,
    oninput: () => {
      state.filter = filter.value;
      show();
    }
  });
  const plot = el("section", { class: "card", "aria-label": "Curves" });
  const head = el("tr"),
    body = el("tbody");
  const table = el("table", { class: "runs" }, el("caption", { class: "unseen" }, "Runs"), el("thead", {}, head), body);
  const list = el(
    "section",
    { class: "card", "aria-label": "Runs" },
    el(
      "div",
      { class: "bar" },
      el("h2", {}, "Runs"),
      filter,
      el("a", { class: "button first", href: "#/new" }, "New run")
    ),
    el("div", { class: "scroll" }, table),
    summary
  );
  const nothing = el("div");
  root.append(el("p", { class: "loading" }, "Loading the runs …"), nothing, plot, list);
  plot.hidden = list.hidden = true;
  const chart = new Chart(plot);

  const everything = el("input", {
    type: "checkbox",
    "aria-label": "Choose all that are shown",
    onchange: () => {
      for (const run of visible().slice(0, everything.checked ? MAX_AT_ONCE : undefined))
        choose(run.id, everything.checked);
      show();
      curves();
    }
  });
  head.append(
    el("th", { scope: "col", class: "pick" }, everything),
    ...COLUMNS.map(([name, heading, , , kind]) =>
      el(
        "th",
        { scope: "col", class: `${name} ${kind ?? ""}`, "data-name": name },
        el(
          "button",
          {
            type: "button",
            onclick: () => {
              state.down = state.sort === name ? !state.down : DESCENDING_FIRST.has(name);
              state.sort = name;
              store();
              show();
            }
          },
          heading
        )
      )
    )
  );

  function visible() {
    const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const text = run =>
      [run.name, run.preset, changes(run), run.dataset, run.status, run.source, run.device].join(" ").toLowerCase();
    const by = COLUMNS.find(([name]) => name === state.sort)[2];
    return all
      .filter(run => words.every(word => text(run).includes(word)))
      .sort((a, b) => {
        const [x, y] = [by(a), by(b)],
          order = x < y ? -1 : x > y ? 1 : 0;
        return state.down ? -order : order;
      });
  }

  function row(run) {
    const pick = el("input", {
      type: "checkbox",
      "aria-label": `Show the curves of ${run.name}`,
      onchange: () => {
        choose(run.id, pick.checked);
        show();
        curves();
      }
    });
    return el(
      "tr",
      {},
      el("td", { class: "pick" }, el("label", { class: "picker" }, pick, el("span", { class: "swatch" }))),
      COLUMNS.map(([name, heading, , , kind]) => el("td", { class: `${name} ${kind ?? ""}`, "data-label": heading }))
    );
  }

  function update(element, run) {
    const colour = state.chosen.get(run.id),
      content = JSON.stringify([run, colour, run.started && ago(run.started)]);
    if (element.content === content) return;
    element.content = content;
    const [pick, ...cells] = element.children;
    pick.querySelector("input").checked = colour !== undefined;
    pick.querySelector(".swatch").className = `swatch ${colour === undefined ? "none" : `c${colour % 8}`}`;
    const focused = element.querySelector("a") === document.activeElement;
    cells.forEach((cell, i) => cell.replaceChildren(...[COLUMNS[i][3](run)].flat().filter(Boolean)));
    if (focused) element.querySelector("a").focus();
  }

  function show() {
    const found = visible();
    for (const cell of head.children) {
      const name = cell.dataset.name;
      if (name) cell.setAttribute("aria-sort", state.sort !== name ? "none" : state.down ? "descending" : "ascending");
    }
    keep(body, found, run => run.id, row, update);
    everything.checked = found.length > 0 && found.slice(0, MAX_AT_ONCE).every(run => state.chosen.has(run.id));
    say(
      summary,
      !found.length
        ? "No run has all these words."
        : found.length < all.length
          ? `${found.length} of ${all.length} runs`
          : many(all.length, "run")
    );
  }

  /** Fetches what is new of the chosen runs and draws. */
  async function curves() {
    const chosen = all.filter(run => state.chosen.has(run.id));
    await Promise.all(
      chosen.map(async run => {
        if (lines.get(run.id)?.step === `${run.step} ${run.val_loss}`) return;
        const data = await metrics(run.id, run.step, lines.get(run.id)?.data);
        lines.set(run.id, { step: `${run.step} ${run.val_loss}`, data });
      })
    );
    chart.draw(
      chosen.map(run => ({
        id: run.id,
        name: run.name,
        colour: state.chosen.get(run.id),
        lines: lines.get(run.id).data,
        flopsPerToken: run.flops_per_token
      }))
    );
  }

  return {
    async refresh() {
      try {
        all = (await get("/v1/runs")).data;
        compare(all);
      } catch (problem) {
        if (!all) root.querySelector(".loading")?.replaceChildren(problem.status === 401 ? "" : problem.message);
        throw problem;
      }
      root.querySelector(".loading")?.remove();
      plot.hidden = list.hidden = !all.length;
      nothing.replaceChildren(
        ...(all.length
          ? []
          : [
              empty(
                "No runs yet",
                "A run that you start here, or with train.py into a folder that the server knows (--runs), is in a table here.",
                el("a", { class: "button first", href: "#/new" }, "Start a run"),
                el("a", { class: "button", href: "#/first" }, "Train a first model")
              )
            ])
      );
      for (const id of state.chosen.keys()) if (!all.some(run => run.id === id)) state.chosen.delete(id);
      if (!state.wasChosen) for (const run of all.filter(run => run.step > 0).slice(0, 5)) choose(run.id, true);
      if (all.length) {
        show();
        await curves();
      }
      return all.some(run => isActive(run.status));
    },
    leave: () => chart.leave()
  };
}
