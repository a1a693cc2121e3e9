// Elements and the text in them. Whatever comes from the server is put in as text, never as HTML.

/** An element. Attributes that begin with "on" are listeners; true is an empty one; null and false are left out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "selected")
      element[name] = value;
    else if (value !== null && value !== undefined && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

/** Changes a text only if it is another: a screen reader says what changes. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Says in `loading` why nothing can be shown yet, with some more. Of a missing key it says nothing: the page asks for
    it. */
export function sayProblem(loading, problem, ...more) {
  loading.replaceChildren(problem.status === 401 ? "" : problem.message, ...more);
}

/** Replaces what is in `list` by `make(item)` for each item, and keeps the elements of items that are there already.
    `key(item)` names an item, `update(element, item)` shows what is new of it. */
export function keep(list, items, key, make, update = () => {}) {
  const there = new Map([...list.children].map(element => [element.dataset.key, element]));
  const wanted = new Set(items.map(item => String(key(item))));
  for (const [name, element] of there) if (!wanted.has(name)) element.remove();
  items.forEach((item, i) => {
    const name = String(key(item));
    let element = there.get(name);
    if (!element) {
      element = make(item);
      element.dataset.key = name;
    }
    if (list.children[i] !== element) list.insertBefore(element, list.children[i] ?? null);
    update(element, item);
  });
}

/** Gives a select its choices, {group: [[value, text], …]}, if they are others; what is chosen stays chosen. */
export function offer(select, groups, chosen = select.value) {
  const content = JSON.stringify(groups);
  if (select.dataset.content !== content) {
    select.dataset.content = content;
    select.replaceChildren(
      ...Object.entries(groups)
        .filter(([, choices]) => choices.length)
        .map(([name, choices]) => {
          const options = choices.map(([value, text]) => new Option(text, value));
          return name ? el("optgroup", { label: name }, options) : options;
        })
        .flat()
    );
  }
  if ([...select.options].some(option => option.value === chosen)) select.value = chosen;
}

/** What a form or a button does: once at a time, with its error in words. */
export function doing(error, action) {
  let busy = false;
  return async event => {
    event?.preventDefault?.();
    if (busy) return;
    busy = true;
    say(error, "");
    try {
      await action(event);
    } catch (problem) {
      if (problem.name !== "AbortError") say(error, problem.message);
    }
    busy = false;
  };
}

let fields = 0;
/** A control under its label, with a hint that a screen reader reads too. */
export function field(label, control, hint = "") {
  control.id ||= `field-${++fields}`;
  const below = hint && el("p", { class: "hint", id: `${control.id}-hint` }, hint);
  if (below) control.setAttribute("aria-describedby", below.id);
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control, below);
}

export const button = (text, onclick, attributes = {}) =>
  el("button", { type: "button", onclick, ...attributes }, text);

export const count = n => (n == null ? "–" : n.toLocaleString("en"));
export const many = (n, what) => `${count(n)} ${what}${n === 1 ? "" : "s"}`;
export const short = x => (x == null ? "–" : x.toPrecision(4));

/** 1392649 as 1.39M. */
export function size(n) {
  if (n == null) return "–";
  const [unit, letter] = [
    [1e15, "P"],
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"]
  ].find(([unit]) => Math.abs(n) >= unit) ?? [1, ""];
  return `${unit === 1 ? Math.round(n) : Number((n / unit).toPrecision(3))}${letter}`;
}

export function bytes(n) {
  const unit = n < 1e3 ? 0 : n < 1e6 ? 1 : n < 1e9 ? 2 : 3;
  return `${unit ? (n / 1000 ** unit).toFixed(1) : n} ${["bytes", "kB", "MB", "GB"][unit]}`;
}

export function duration(seconds) {
  return seconds < 90
    ? `${Math.ceil(seconds)} s`
    : seconds < 5400
      ? `${Math.round(seconds / 60)} min`
      : seconds < 172800
        ? `${(seconds / 3600).toFixed(1)} h`
        : `${(seconds / 86400).toFixed(1)} days`;
}

export const when = seconds => new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

/** "3 min ago" */
export function ago(seconds) {
  const past = Date.now() / 1000 - seconds;
  return past < 60 ? "just now" : past < 172800 ? `${duration(past)} ago` : when(seconds);
}

export const value = x => (x === null ? "null" : typeof x === "string" ? x : JSON.stringify(x));

/** A key's last part, which says enough where there is little room. */
export const lastPart = key => key.replace(/^(model_hyperparams|optimizer_hyperparams)\./, "");

export const STATUS = {
  validating_files: "waiting",
  queued: "waiting",
  running: "running",
  succeeded: "done",
  failed: "failed",
  cancelled: "stopped",
  stopped: "stopped",
  paused: "paused"
};
export const isActive = status => ["validating_files", "queued", "running"].includes(status);
export const chip = status => el("span", { class: `chip ${STATUS[status] ?? status}` }, STATUS[status] ?? status);

/** What stands where there is nothing to show. */
export const empty = (title, text, ...actions) =>
  el("div", { class: "empty" }, el("h3", {}, title), el("p", {}, text), el("div", { class: "buttons" }, actions));

/** Where a person writes with a model. */
export const writeAddress = model => `#/write?model=${encodeURIComponent(model)}`;

/** Copies a text, and says so on the button. */
export const copyButton = text =>
  button(
    "Copy",
    async event => {
      const copier = event.currentTarget;
      try {
        await navigator.clipboard.writeText(text());
        say(copier, "Copied");
      } catch {
        say(copier, "Select and copy it");
      }
      setTimeout(() => say(copier, "Copy"), 2000);
    },
    { class: "small" }
  );
