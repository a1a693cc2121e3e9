// Writing with models: prompt and continuation in one editor, several texts side by side, each token's probability.

import { complete, get } from "./api.js";
import { button, count, doing, el, empty, field, keep, offer, say } from "./dom.js";
import { History, recall, store } from "./history.js";
import { Continuation, TokenPopover, describeToken, tokens } from "./tokens.js";

export const title = "Write";

const SETTINGS = [
  // [name, label, what a field starts with, attributes, hint]
  ["max_tokens", "Most tokens", 200, { min: 1, step: 1 }, ""],
  ["temperature", "Temperature", 0.8, { min: 0, max: 100, step: "any" }, "0: the likeliest"],
  ["top_k", "Top k", 0, { min: 0, step: 1 }, "0: all"],
  ["top_p", "Top p", 1, { min: 0.0001, max: 1, step: "any" }, "1: all"],
  ["min_p", "Min p", 0, { min: 0, max: 1, step: "any" }, "0: all"],
  ["repetition_penalty", "Repetition penalty", 1, { min: 0.01, max: 10, step: "any" }, "1: none"],
  ["n", "Samples", 1, { min: 1, max: 8, step: 1 }, "side by side"],
  ["seed", "Seed", "", { min: 0, max: 2 ** 53 - 9, step: 1, placeholder: "drawn" }, "the same one, the same text"]
];
const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 2 ** 31;
const REASONS = { stop: "it came to its end", length: "it has the most tokens that it may" };

export function mount(root, { query }) {
  let writing = null,
    before = null,
    models = null,
    seeds = [];
  const kept = recall("write", {});

  const model = el("select", { "aria-label": "Model" });
  const editor = el("div", {
    class: "editor",
    contenteditable: "plaintext-only",
    role: "textbox",
    "aria-multiline": "true",
    id: "editor",
    "aria-label": "Prompt and continuation",
    tabindex: "0",
    spellcheck: "false",
    "aria-keyshortcuts": "Control+Enter",
    "data-placeholder": "Write the beginning of a text. The model continues it."
  });
  // "plaintext-only" takes no formatting from what is pasted; an older browser does not know it
  const editable = editor.contentEditable === "plaintext-only" ? "plaintext-only" : "true";
  editor.textContent = recall("draft", "");
  const shade = el("input", {
    type: "checkbox",
    checked: kept.shade ?? true,
    onchange: () => {
      keepSettings();
      showShade();
    }
  });
  const go = button("Write", () => start(), { class: "first" });
  const again = button("Regenerate", () => {
    editor.textContent = before;
    start();
  });
  const stop = button("Stop", () => writing?.abort());
  const clear = button("Clear", () => {
    editor.textContent = "";
    choices.replaceChildren();
    before = null;
    show();
    editor.focus();
  });
  const error = el("p", { class: "error", role: "alert" }),
    status = el("p", { class: "hint", role: "status" });
  const reuse = button(
    "Use this seed again",
    () => {
      inputs.seed.value = seeds[0];
      keepSettings();
      show();
      inputs.seed.focus();
    },
    { class: "small" }
  );
  const choices = el("div", { class: "choices" });
  const inputs = Object.fromEntries(
    SETTINGS.map(([name, , value, attributes]) => [
      name,
      el("input", { type: "number", ...attributes, value: kept[name] ?? value, onchange: () => keepSettings() })
    ])
  );
  const stops = el("textarea", { rows: 1, class: "code", onchange: () => keepSettings(), value: kept.stops ?? "" });
  const source = el("textarea", { rows: 3 });
  const others = el("div", { class: "others" });
  const history = new History(one => putBack(one));
  const page = el(
    "div",
    { class: "columns wide-left" },
    el(
      "div",
      {},
      el(
        "section",
        { class: "card writing", "aria-label": "Text" },
        el(
          "div",
          { class: "bar" },
          el("label", { class: "inline grow" }, el("span", {}, "Model"), model),
          el("label", { class: "check" }, shade, "shade unlikely tokens")
        ),
        editor,
        el(
          "div",
          { class: "buttons" },
          go,
          again,
          stop,
          clear,
          el("span", { class: "hint" }, "Ctrl+Enter writes, Escape stops")
        ),
        error,
        el("div", { class: "bar tight" }, status, reuse)
      ),
      choices
    ),
    el(
      "div",
      {},
      el(
        "section",
        { class: "card", "aria-label": "Settings" },
        el("h3", {}, "Settings"),
        el(
          "div",
          { class: "fields" },
          SETTINGS.map(([name, label, , , hint]) => field(label, inputs[name], hint))
        ),
        field("Stop at, one on each line; \\n is a line’s end", stops),
        el("details", {}, el("summary", {}, "Side by side with other models"), others),
        el(
          "details",
          {},
          el("summary", {}, "For a model that reads one text and writes another"),
          field("What it reads; the editor’s text then begins its answer", source)
        )
      ),
      el(
        "section",
        { class: "card", "aria-label": "History" },
        el("h3", {}, "History"),
        el("p", { class: "hint" }, "Kept in this browser only."),
        history.element
      )
    )
  );
  const loading = el("p", { class: "loading" }, "Loading the models …"),
    none = el("div");
  page.hidden = true;
  root.append(loading, none, page);

  // ---- settings ----

  function keepSettings() {
    store("write", {
      ...Object.fromEntries(SETTINGS.map(([name]) => [name, inputs[name].value])),
      stops: stops.value,
      shade: shade.checked,
      model: model.value
    });
  }
  const showShade = () => page.classList.toggle("shade", shade.checked);

  function request(name, seed, n) {
    const number = name => (inputs[name].value === "" ? undefined : Number(inputs[name].value));
    const stop = stops.value
      .split("\n")
      .filter(Boolean)
      .map(stop => stop.replaceAll("\\n", "\n"));
    const body = {
      model: name,
      prompt: before,
      max_tokens: number("max_tokens"),
      temperature: number("temperature"),
      top_k: number("top_k"),
      top_p: number("top_p"),
      min_p: number("min_p"),
      seed,
      n,
      logprobs: 5,
      source: source.value || undefined,
      stop: stop.length ? stop : undefined
    };
    if ((number("repetition_penalty") ?? 1) !== 1) body.repetition_penalty = number("repetition_penalty");
    return body;
  }

  // ---- writing ----

  const chosenModels = () => [
    model.value,
    ...[...others.querySelectorAll("input:checked")].map(box => box.value).filter(name => name !== model.value)
  ];

  const start = doing(error, async () => {
    popover.hide();
    before = editor.textContent;
    const names = chosenModels(),
      n = Math.max(1, Number(inputs.n.value) || 1),
      single = names.length * n === 1;
    const seed = inputs.seed.value === "" ? drawSeed() : Number(inputs.seed.value),
      began = performance.now();
    const found = [];
    seeds = [seed];
    choices.replaceChildren();
    writing = new AbortController();
    editor.setAttribute("aria-busy", "true");
    page.classList.toggle("busy", true);
    show();
    stop.focus();
    say(status, "Writing …");
    let used = 0;
    const problems = [];
    const running = names.map(name => {
      const own = Array.from({ length: n }, (_, i) =>
        single ? new Continuation(editor, name, seed) : choice(name, seed + i)
      );
      found.push(...own);
      return complete(request(name, seed, n), piece => own[piece.index]?.add(piece), writing.signal).then(
        usage => {
          used += usage?.completion_tokens ?? 0;
        },
        problem => problems.push([name, problem])
      );
    });
    await Promise.all(running);
    const stopped = writing.signal.aborted;
    writing = null;
    editor.removeAttribute("aria-busy");
    page.classList.toggle("busy", false);
    for (const one of found) {
      one.finish();
      one.onEnd?.();
    }
    const seconds = (performance.now() - began) / 1000,
      reasons = new Set(found.map(one => REASONS[one.reason]).filter(Boolean));
    say(
      status,
      stopped
        ? `Stopped. Seed ${seed}.`
        : problems.length === names.length
          ? ""
          : `${count(used)} tokens in ${seconds.toFixed(1)} s, ${count(Math.round(used / seconds))} tokens/s; seed ${seed}` +
            `${n > 1 ? ` to ${seed + n - 1}` : ""}${reasons.size === 1 ? `; ${[...reasons][0]}` : ""}.`
    );
    const settings = Object.fromEntries(SETTINGS.map(([name]) => [name, inputs[name].value]));
    if (found.some(one => one.text)) history.add({ prompt: before, settings, stopped, found });
    if (document.activeElement === stop) (single ? editor : go).focus();
    if (single) caretToEnd();
    show();
    store("draft", editor.textContent);
    const real = problems.filter(([, problem]) => problem.name !== "AbortError");
    if (real.length)
      throw new Error(
        real.map(([name, problem]) => (names.length > 1 ? `${name}: ${problem.message}` : problem.message)).join(" ")
      );
  });

  /** A card for one of several texts. */
  function choice(name, seed) {
    const text = el("p", { class: "text" }),
      keepIt = button(
        "Go on with this one",
        () => {
          editor.textContent = before;
          editor.append(...text.childNodes);
          choices.replaceChildren();
          store("draft", editor.textContent);
          editor.focus();
          caretToEnd();
        },
        { class: "small", disabled: true }
      );
    choices.append(
      el("article", { class: "card" }, el("h4", {}, name), el("p", { class: "hint" }, `seed ${seed}`), text, keepIt)
    );
    const one = new Continuation(text, name, seed);
    one.onEnd = () => {
      keepIt.disabled = !one.text;
    };
    return one;
  }

  function caretToEnd() {
    const range = document.createRange();
    range.selectNodeContents(editor);
    range.collapse(false);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    editor.scrollTop = editor.scrollHeight;
    popover.hide();
  }

  function show() {
    const busy = writing !== null;
    go.hidden = busy;
    stop.hidden = !busy;
    clear.hidden = busy;
    again.hidden = busy || before === null || !editor.textContent.startsWith(before) || editor.textContent === before;
    reuse.hidden = busy || !seeds.length || inputs.seed.value === String(seeds[0]);
    editor.contentEditable = busy ? "false" : editable;
  }

  editor.addEventListener("input", () => {
    for (const element of editor.querySelectorAll(".token")) {
      // what a person has changed is no token of the model's
      if (element.textContent !== tokens.get(element)?.part)
        element.replaceWith(document.createTextNode(element.textContent));
    }
    popover.hide();
    store("draft", editor.textContent);
    show();
  });
  page.addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !writing) {
      event.preventDefault();
      start();
    }
    if (event.key === "Escape") {
      if (writing) writing.abort();
      else popover.hide();
    }
  });

  // ---- the token at the mouse or at the caret, and what was written before ----

  const popover = new TokenPopover(editor, {
    isBusy: () => writing !== null,
    /** Puts another token in the place of one, drops what followed and writes on. */
    onReplace: (element, text) => {
      while (element.nextSibling) element.nextSibling.remove();
      element.replaceWith(document.createTextNode(text));
      start();
    }
  });
  editor.after(popover.element);
  choices.addEventListener("mouseover", event => {
    const token = event.target.closest?.(".token");
    if (token) token.title = describeToken(token);
  });

  function putBack(one) {
    for (const [name, value] of Object.entries(one.settings)) if (inputs[name]) inputs[name].value = value;
    if (models?.some(([name]) => name === one.texts[0].model)) model.value = one.texts[0].model;
    before = one.prompt;
    seeds = [one.texts[0].seed];
    choices.replaceChildren();
    editor.textContent = one.prompt + (one.texts.length === 1 ? one.texts[0].text : "");
    if (one.texts.length > 1)
      for (const text of one.texts) {
        const shown = choice(text.model, text.seed);
        shown.add({ text: text.text });
        shown.onEnd();
      }
    show();
    editor.focus();
  }

  model.addEventListener("change", keepSettings);
  showShade();
  show();

  return {
    async refresh() {
      let data;
      try {
        ({ data } = await get("/v1/models"));
      } catch (problem) {
        if (!models) loading.replaceChildren(problem.status === 401 ? "" : problem.message);
        throw problem;
      }
      const wanted = query.get("model");
      models = data.sort((a, b) => b.created - a.created).map(one => [one.id, one.id]); // the newest is the default
      const extra = wanted && !models.some(([name]) => name === wanted) ? [[wanted, wanted]] : [];
      loading.hidden = true;
      page.hidden = !models.length && !extra.length;
      none.replaceChildren(
        ...(page.hidden
          ? [
              empty(
                "No model yet",
                "A model appears here as soon as a run has finished, or its first checkpoint is saved.",
                el("a", { class: "button first", href: "#/first" }, "Train your first model")
              )
            ]
          : [])
      );
      const chosen = model.options.length ? model.value : (wanted ?? kept.model);
      offer(model, { Models: models, Checkpoints: extra }, chosen);
      const boxes = [...models, ...extra];
      keep(
        others,
        boxes,
        ([name]) => name,
        ([name]) => el("label", { class: "check" }, el("input", { type: "checkbox", value: name }), name)
      );
      return false;
    },
    leave() {
      writing?.abort();
      popover.leave();
    }
  };
}
