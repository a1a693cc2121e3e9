// A new run: a form made from the schema of the keys, what the run will cost, and its start.

import { get, post } from "./api.js";
import { CostPanel } from "./cost.js";
import { button, doing, el, field, lastPart, offer, say, value } from "./dom.js";
import { choicesOf, flatten, isNumber, keysOf, kinds, nest, parse, range } from "./schema.js";

export const title = "New run";

const GROUPS = [
  // [title, whether it is open, keys or the beginning of keys]
  [
    "Length and learning rate",
    true,
    [
      "max_iters",
      "batch_size",
      "gradient_accumulation_steps",
      "learning_rate",
      "warmup_iters",
      "min_lr",
      "cooldown_frac",
      "lr_decay_iters",
      "decay_lr",
      "grad_clip"
    ]
  ],
  ["Model", true, ["model_hyperparams."]],
  ["Optimizer", false, ["optimizer_hyperparams."]],
  [
    "Evaluations and checkpoints",
    false,
    ["eval_interval", "eval_iters", "log_interval", "sample_length", "sample_prompt", "checkpoints."]
  ],
  ["Everything else", false, [""]]
];
const FIRST_MODEL_KEYS = ["arch", "n_layer", "n_embd", "n_head", "block_size", "vocab_size"];

export function mount(root, { query }) {
  let presets = null,
    base = {},
    keys = new Map(),
    changes = {},
    effective = {},
    datasets = [],
    estimate = null,
    timer = null,
    asking = null;
  const rows = new Map(); // key → {input, row, mark, group}
  const loading = el("p", { class: "loading" }, "Loading the presets …");
  const start = el("select", { onchange: () => begin(start.value, {}) });
  const data = el("select", { onchange: () => ask() });
  const suffix = el("input", {
    pattern: "[A-Za-z0-9_\\-]{1,64}",
    title: "1 to 64 letters, digits, - and _",
    autocomplete: "off",
    placeholder: "wide, say"
  });
  const seed = el("input", { type: "number", min: 0, max: 2 ** 31 - 1, step: 1, placeholder: "drawn" });
  const error = el("p", { class: "error", role: "alert" });
  const filter = el("input", {
    type: "search",
    placeholder: "Find a key or a word of its meaning",
    "aria-label": "Find a key",
    oninput: () => showFilter()
  });
  const onlyChanged = el("input", { type: "checkbox", onchange: () => showFilter() });
  const groups = el("div", { class: "groups" });
  const json = el("textarea", { class: "code", rows: 10, spellcheck: "false", oninput: () => readJson() });
  const jsonError = el("p", { class: "error", role: "alert" }),
    jsonView = el("details", {}, el("summary", {}, "As JSON, to copy and paste"));
  jsonView.append(
    field("The keys that differ", json, "Nested or dotted. What is pasted here fills the form."),
    jsonError
  );
  const cost = new CostPanel();
  const changed = el("p", { class: "hint", role: "status" });
  const noData = el(
    "p",
    { class: "warning" },
    "There is no text to train on yet. ",
    el("a", { href: "#/data" }, "Bring a file"),
    " first."
  );
  const form = el("form", {
    novalidate: true,
    onsubmit: doing(error, async () => {
      if (!data.value) throw new Error("Choose what to train on. A file or a dataset is brought under Data.");
      const made = await post("/v1/fine_tuning/jobs", {
        model: start.value,
        training_file: data.value,
        hyperparameters: nest(changes),
        suffix: suffix.value || undefined,
        seed: seed.value === "" ? undefined : Number(seed.value)
      });
      location.hash = `#/runs/${made.id}`;
    })
  });
  form.append(
    el(
      "div",
      { class: "columns wide-left plan" },
      el(
        "div",
        {},
        el(
          "section",
          { class: "card", "aria-label": "Beginning" },
          el("h2", {}, "New run"),
          el(
            "div",
            { class: "fields wide" },
            field("Start from", start, "A preset, or a model to train further."),
            field("Train on", data, "A dataset, or a file, of which one is built."),
            field("Part of the model’s name", suffix),
            field("Seed", seed, "The same seed repeats the run.")
          ),
          noData
        ),
        el(
          "section",
          { class: "card", "aria-label": "Keys" },
          el(
            "div",
            { class: "bar" },
            el("h2", {}, "Keys"),
            filter,
            el("label", { class: "check" }, onlyChanged, "only changed ones")
          ),
          groups,
          jsonView
        )
      ),
      el(
        "div",
        {},
        el(
          "section",
          { class: "card sticky", "aria-label": "Cost" },
          el("h2", {}, "What it will cost"),
          el("p", {}),
          cost.element,
          changed,
          el(
            "div",
            { class: "buttons" },
            el("button", { class: "first" }, "Start the run"),
            button("Forget the changes", () => begin(start.value, {}))
          ),
          error
        )
      )
    )
  );
  form.hidden = true;
  root.append(loading, form);

  // ---- the form ----

  /** Every field anew: of a preset or a model, with some changes. */
  async function begin(name, given) {
    say(error, "");
    offerStart(name);
    const known = presets.data.find(preset => preset.id === name);
    base = known ? known.values : (await get(`/v1/presets/${encodeURIComponent(name)}`)).values;
    keys = keysOf(presets.config_schema, base["model_hyperparams.arch"]);
    for (const key of presets.server_keys) keys.delete(key);
    for (const key of ["$schema", "seed"]) keys.delete(key);
    changes = { ...given };
    effective = { ...base };
    build();
    showAll();
    ask(0);
  }

  function build() {
    rows.clear();
    const left = new Set(keys.keys());
    groups.replaceChildren(
      ...GROUPS.map(([name, open, beginnings]) => {
        let own = beginnings.flatMap(begin =>
          [...left].filter(key => begin === "" || key === begin || (begin.endsWith(".") && key.startsWith(begin)))
        );
        if (name === "Model")
          own = [
            ...FIRST_MODEL_KEYS.map(key => `model_hyperparams.${key}`).filter(key => left.has(key)),
            ...own.filter(key => !FIRST_MODEL_KEYS.includes(lastPart(key)))
          ];
        for (const key of own) left.delete(key);
        const rare = own.filter(key => key.includes("rope_scaling."));
        const details = el(
          "details",
          { class: "group", open },
          el("summary", {}, name, el("span", { class: "changes-count" })),
          el("div", { class: "fields wide" }, own.filter(key => !rare.includes(key)).map(row)),
          rare.length
            ? el(
                "details",
                {},
                el("summary", {}, "rope_scaling: a longer context than it was trained for"),
                el("div", { class: "fields wide" }, rare.map(row))
              )
            : null
        );
        return own.length ? details : [];
      }).flat()
    );
  }

  function row(key) {
    const one = keys.get(key),
      choices = choicesOf(one),
      fixed = key === "model_hyperparams.arch";
    const onlyChoices = choices.length && !isNumber(one);
    let input;
    if (onlyChoices)
      input = el(
        "select",
        {},
        choices.map(choice => new Option(String(choice), String(choice)))
      );
    else
      input = el("input", {
        type: "text",
        inputmode: isNumber(one) && !choices.length ? "decimal" : null,
        autocomplete: "off",
        spellcheck: "false",
        placeholder: kinds(one).some(kind => kind.type === "null") ? "by itself" : null
      });
    input.disabled = fixed;
    input.addEventListener(onlyChoices ? "change" : "input", () => change(key, input.value));
    const hint = [
      fixed ? "the family; a preset of another family has another" : one.description,
      range(one),
      choices.length && !onlyChoices ? `or ${choices.join(", ")}` : ""
    ]
      .filter(Boolean)
      .join("; ");
    const mark = el("p", { class: "mark" }),
      whole = field(
        key.startsWith("model_hyperparams.") || key.startsWith("optimizer_hyperparams.") ? lastPart(key) : key,
        input,
        hint
      );
    const back = button(
      "Put back",
      () => {
        delete changes[key];
        showAll();
        ask();
        input.focus();
      },
      { class: "small", "aria-label": `Put ${key} back` }
    );
    const was = el("span");
    mark.append(was, back);
    whole.append(mark);
    whole.dataset.key = key;
    rows.set(key, { input, whole, mark, was, words: `${key} ${one.description ?? ""}`.toLowerCase() });
    return whole;
  }

  function change(key, text) {
    const to = parse(text, keys.get(key));
    if (to === undefined || JSON.stringify(to) === JSON.stringify(base[key] ?? null)) delete changes[key];
    else changes[key] = to;
    showRow(key, false);
    showJson();
    showCounts();
    ask();
  }

  const shownText = to =>
    to === null || to === undefined
      ? ""
      : typeof to === "string"
        ? to
        : JSON.stringify(typeof to === "number" && !Number.isInteger(to) ? Number(to.toPrecision(6)) : to);

  function showRow(key, fill = true) {
    const { input, whole, mark, was } = rows.get(key),
      isChanged = key in changes;
    if (fill && document.activeElement !== input) input.value = shownText(isChanged ? changes[key] : effective[key]);
    whole.classList.toggle("changed", isChanged);
    mark.hidden = !isChanged;
    if (isChanged) say(was, `preset: ${value(base[key] ?? null)}`);
  }

  function showAll() {
    for (const key of rows.keys()) showRow(key);
    showJson();
    showCounts();
    showFilter();
  }

  function showCounts() {
    for (const group of groups.children) {
      const n = group.querySelectorAll(".field.changed").length;
      say(group.querySelector(".changes-count"), n ? ` ${n} changed` : "");
    }
    const n = Object.keys(changes).length;
    say(
      changed,
      n
        ? `${n} key${n === 1 ? "" : "s"} differ${n === 1 ? "s" : ""} from ${start.value}: ${Object.entries(changes)
            .map(([key, to]) => `${lastPart(key)} ${value(to)}`)
            .join(", ")}.`
        : `All keys are those of ${start.value}.`
    );
  }

  function showFilter() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const [key, { whole, words: own }] of rows)
      whole.hidden = !words.every(word => own.includes(word)) || (onlyChanged.checked && !(key in changes));
    for (const group of groups.querySelectorAll("details")) {
      const any = [...group.querySelectorAll(".field")].some(field => !field.hidden);
      group.hidden = !any;
      if (words.length || onlyChanged.checked) group.open = any;
    }
  }

  // ---- JSON ----

  function showJson() {
    if (document.activeElement !== json)
      json.value = Object.keys(changes).length ? JSON.stringify(nest(changes), null, 2) : "{}";
    json.removeAttribute("aria-invalid");
    say(jsonError, "");
  }

  function readJson() {
    try {
      const given = JSON.parse(json.value.trim() || "{}");
      if (given === null || typeof given !== "object" || Array.isArray(given))
        throw new Error("it is no object, { … }");
      changes = Object.fromEntries(
        Object.entries(flatten(given)).filter(
          ([key, to]) =>
            key !== "$schema" &&
            !presets.server_keys.includes(key) &&
            !(key in base && JSON.stringify(to) === JSON.stringify(base[key]))
        )
      );
      if (Number.isInteger(changes.seed)) seed.value = changes.seed;
      delete changes.seed;
      json.removeAttribute("aria-invalid");
      say(jsonError, "");
      for (const key of rows.keys()) showRow(key);
      showCounts();
      showFilter();
      ask();
    } catch (problem) {
      json.setAttribute("aria-invalid", "true");
      say(jsonError, `This is not JSON yet: ${problem.message}`);
    }
  }

  // ---- what it costs ----

  function ask(wait = 400) {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      asking?.abort();
      asking = new AbortController();
      const vocab = datasets.find(dataset => dataset.id === data.value)?.result?.encoder.vocab_size;
      try {
        estimate = await post(
          "/v1/fine_tuning/estimates",
          { model: start.value, hyperparameters: nest(changes), vocab_size: vocab },
          asking.signal
        );
        effective = { ...base, ...estimate.values };
        if (effective.lr_decay_iters === effective.max_iters) effective.lr_decay_iters = null;
        for (const key of rows.keys()) showRow(key);
        cost.show(estimate);
        showProblems("");
      } catch (problem) {
        if (problem.name !== "AbortError") showProblems(problem.message);
      }
    }, wait);
  }

  function showProblems(text) {
    cost.fail(text);
    for (const [key, { input }] of rows) {
      if (text && (text.includes(`${key} = `) || text.includes(`${key}: `))) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    }
  }

  // ---- where it begins ----

  const offerStart = chosen =>
    offer(start, { Presets: presets.data.map(({ id }) => [id, id]), Models: models.map(({ id }) => [id, id]) }, chosen);
  let models = [];

  /** The preset of the same family with the fewest differences. */
  function nearestPreset(values) {
    const same = presets.data.filter(
      preset => preset.values["model_hyperparams.arch"] === values["model_hyperparams.arch"]
    );
    const far = preset =>
      Object.keys(values).filter(key => JSON.stringify(values[key]) !== JSON.stringify(preset.values[key])).length;
    return same.sort((a, b) => far(a) - far(b))[0] ?? presets.data[0];
  }

  async function duplicate(id) {
    const { summary, values } = await get(`/v1/runs/${id}`);
    if (id.startsWith("ftjob-")) {
      const job = await get(`/v1/fine_tuning/jobs/${id}`);
      if (datasets.some(dataset => dataset.id === job.dataset)) data.value = job.dataset;
      else data.value = job.training_file;
      seed.value = job.seed;
    } else if (Number.isInteger(values.seed)) seed.value = values.seed;
    const known = [...presets.data, ...models].some(one => one.id === summary.preset);
    if (known) return begin(summary.preset, summary.changed);
    const preset = nearestPreset(values);
    const differ = Object.entries(values).filter(
      ([key, to]) =>
        key !== "seed" &&
        key in preset.values &&
        JSON.stringify(to) !== JSON.stringify(preset.values[key]) &&
        !(key === "lr_decay_iters" && to === values.max_iters)
    );
    return begin(preset.id, Object.fromEntries(differ));
  }

  return {
    async refresh() {
      if (presets) return false;
      let files;
      try {
        [presets, datasets, files, models] = await Promise.all([
          get("/v1/presets"),
          ...["/v1/datasets?limit=100", "/v1/files?limit=1000", "/v1/models"].map(async path => (await get(path)).data)
        ]);
      } catch (problem) {
        presets = null;
        loading.replaceChildren(problem.status === 401 ? "" : problem.message);
        throw problem;
      }
      const usable = datasets.filter(dataset => !["failed", "cancelled"].includes(dataset.status));
      offer(
        data,
        {
          Datasets: usable.map(one => [one.id, one.name || one.id.slice(0, 11)]),
          Files: files.map(file => [file.id, file.filename])
        },
        query.get("dataset") ?? undefined
      );
      noData.hidden = usable.length + files.length > 0;
      const from = query.get("from");
      try {
        if (from) await duplicate(from);
        else await begin(query.get("preset") ?? "tiny", {});
      } catch (problem) {
        await begin("tiny", {});
        say(error, problem.message);
      }
      loading.hidden = true;
      form.hidden = false;
      return false;
    },
    leave() {
      clearTimeout(timer);
      asking?.abort();
    }
  };
}
