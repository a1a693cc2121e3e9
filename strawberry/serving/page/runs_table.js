// The table of runs: sorted, filtered, and chosen from.

import { ago, el, keep, many, say } from "./dom.js";
import { choose, sortBy, state } from "./runs_chosen.js";
import { COLUMNS, DESCENDING_FIRST, changes } from "./runs_columns.js";

const MAX_AT_ONCE = 24; // runs that one press chooses: a chart of more shows nothing

/** The runs that the filter finds, sorted. */
function visible(all) {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const text = run =>
    [run.name, run.preset, changes(run), run.dataset, run.status, run.source, run.device].join(" ").toLowerCase();
  const by = COLUMNS.find(([name]) => name === state.sort)[2];
  const found = all.filter(run => words.every(word => text(run).includes(word)));
  return found.sort((a, b) => {
    const [x, y] = [by(a), by(b)],
      order = x < y ? -1 : x > y ? 1 : 0;
    return state.down ? -order : order;
  });
}

function countText(found, all) {
  if (!found) return "No run has all these words.";
  return found < all ? `${found} of ${all} runs` : many(all, "run");
}

/** Shows in a run's row what has changed. */
function updateRow(row, run) {
  const colour = state.chosen.get(run.id),
    content = JSON.stringify([run, colour, run.started && ago(run.started)]);
  if (row.content === content) return;
  row.content = content;
  const [pick, ...cells] = row.children;
  pick.querySelector("input").checked = colour !== undefined;
  pick.querySelector(".swatch").className = `swatch ${colour === undefined ? "none" : `c${colour % 8}`}`;
  const isFocused = row.querySelector("a") === document.activeElement;
  cells.forEach((cell, i) => cell.replaceChildren(...[COLUMNS[i][3](run)].flat().filter(Boolean)));
  if (isFocused) row.querySelector("a").focus();
}

export class RunTable {
  /** onChoice() is called when other runs are chosen. */
  constructor(onChoice) {
    this.onChoice = onChoice;
    this.all = [];
    this.summary = el("p", { class: "hint", role: "status" });
    this.filter = el("input", {
      type: "search",
      placeholder: "Filter by name, preset, key, dataset, status",
      "aria-label": "Filter the runs",
      value: state.filter,
      oninput: () => {
        state.filter = this.filter.value;
        this.update();
      }
    });
    this.everything = el("input", {
      type: "checkbox",
      "aria-label": "Choose all that are shown",
      onchange: () => this.chooseAll(this.everything.checked)
    });
    this.head = this.makeHead();
    this.body = el("tbody");
    this.element = this.makeCard();
  }

  makeCard() {
    const caption = el("caption", { class: "unseen" }, "Runs");
    return el(
      "section",
      { class: "card", "aria-label": "Runs" },
      el(
        "div",
        { class: "bar" },
        el("h2", {}, "Runs"),
        this.filter,
        el("a", { class: "button first", href: "#/new" }, "New run")
      ),
      el("div", { class: "scroll" }, el("table", { class: "runs" }, caption, el("thead", {}, this.head), this.body)),
      this.summary
    );
  }

  makeHead() {
    const cells = COLUMNS.map(([name, heading, , , kind]) => {
      const sort = () => this.sort(name);
      return el(
        "th",
        { scope: "col", class: `${name} ${kind ?? ""}`, "data-name": name },
        el("button", { type: "button", onclick: sort }, heading)
      );
    });
    return el("tr", {}, el("th", { scope: "col", class: "pick" }, this.everything), cells);
  }

  makeRow(run) {
    const pick = el("input", {
      type: "checkbox",
      "aria-label": `Show the curves of ${run.name}`,
      onchange: () => this.choose([run], pick.checked)
    });
    return el(
      "tr",
      {},
      el("td", { class: "pick" }, el("label", { class: "picker" }, pick, el("span", { class: "swatch" }))),
      COLUMNS.map(([name, heading, , , kind]) => el("td", { class: `${name} ${kind ?? ""}`, "data-label": heading }))
    );
  }

  // ---- what a person does ----

  sort(name) {
    sortBy(name, state.sort === name ? !state.down : DESCENDING_FIRST.has(name));
    this.update();
  }

  choose(runs, is) {
    for (const run of runs) choose(run.id, is);
    this.update();
    this.onChoice();
  }

  chooseAll(is) {
    this.choose(visible(this.all).slice(0, is ? MAX_AT_ONCE : undefined), is);
  }

  // ---- what is shown ----

  show(all) {
    this.all = all;
    this.update();
  }

  update() {
    const found = visible(this.all);
    for (const cell of this.head.children) {
      const { name } = cell.dataset;
      if (name) cell.setAttribute("aria-sort", state.sort !== name ? "none" : state.down ? "descending" : "ascending");
    }
    keep(
      this.body,
      found,
      run => run.id,
      run => this.makeRow(run),
      updateRow
    );
    this.everything.checked = found.length > 0 && found.slice(0, MAX_AT_ONCE).every(run => state.chosen.has(run.id));
    say(this.summary, countText(found.length, this.all.length));
  }
}
