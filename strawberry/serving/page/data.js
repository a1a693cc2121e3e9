// Files, datasets and models: bring text, look at it, build a dataset of it; what the disk holds.

import { ask, get, post, remove } from "./api.js";
import { ago, button, bytes, chip, count, doing, el, field, isActive, keep, many, offer, say, size } from "./dom.js";
import { dropZone } from "./upload.js";

export const title = "Data";

const LEFT_OUT = {
  exact_duplicates: "equal to another",
  near_duplicates: "nearly equal to another",
  too_short: "too short",
  too_long: "too long",
  not_utf8: "not UTF-8",
  other_kinds: "of another kind",
  without_texts: "without texts"
};
const named = dataset => dataset.name || dataset.id.slice(0, 11);

/** Shows the first documents of what is at `path` when it is opened. */
function preview(path, label = "First documents") {
  const list = el("ol", { class: "documents" }),
    note = el("p", { class: "hint" });
  const details = el(
    "details",
    {
      ontoggle: async () => {
        if (!details.open || list.children.length) return;
        say(note, "Reading …");
        try {
          const { data } = await get(path);
          list.replaceChildren(
            ...data.map(document =>
              el("li", { class: "text" }, document.text, !document.is_whole && el("span", { class: "hint" }, " …"))
            )
          );
          say(note, data.length ? "" : "There are none.");
        } catch (problem) {
          say(note, problem.message);
        }
      }
    },
    el("summary", {}, label),
    note,
    list
  );
  return details;
}

export function mount(root) {
  let files = null,
    datasets = null;
  const error = el("p", { class: "error", role: "alert" }),
    status = el("p", { class: "hint", role: "status" });
  const formError = el("p", { class: "error", role: "alert" }),
    formStatus = el("p", { class: "unseen", role: "status" });
  const disk = el("p", { class: "facts" });
  const zone = dropZone(error, status, async stored => {
    await self.refresh();
    for (const { id } of stored) check(id, true);
    summarize();
  });
  const fileList = el("ul", { class: "list" }),
    noFiles = el("p", { class: "hint" });
  const list = el("ul", { class: "list" }),
    none = el("p", { class: "hint" });
  const modelList = el("ul", { class: "list" }),
    noModels = el("p", { class: "hint" }),
    modelError = el("p", { class: "error", role: "alert" });
  const loading = el("p", { class: "loading" }, "Loading the data …"),
    page = el("div");

  const name = el("input", { maxlength: 255, autocomplete: "off", placeholder: "stories, say" });
  const share = el("input", { type: "number", min: 0.001, max: 0.999, step: "any", value: 0.1, required: true });
  const duplicates = el(
    "select",
    {},
    new Option("leave out equal documents", "exact"),
    new Option("leave out similar ones too", "near"),
    new Option("keep all", "none")
  );
  const similarity = el("input", { type: "number", min: 0.3, max: 1, step: "any", value: 0.8 });
  const encoder = el("select", {
    onchange: () => {
      vocabulary.parentElement.hidden = encoder.value !== "";
    }
  });
  const vocabulary = el("input", { type: "number", min: 258, step: 1, placeholder: "8192, or fewer" });
  const least = el("input", { type: "number", min: 1, step: 1, value: 1 }),
    most = el("input", { type: "number", min: 1, step: 1, placeholder: "any" });
  const errors = el("select", {}, new Option("refuse the file", "strict"), new Option("put U+FFFD there", "replace"));
  const chosenSummary = el("p", { class: "hint", role: "status" });
  const form = el(
    "form",
    {
      onsubmit: doing(formError, async () => {
        const rows = [...fileList.children].filter(row => row.querySelector("[type=checkbox]").checked);
        if (!rows.length) throw new Error("Choose at least one file above.");
        const weights = rows.map(row => Number(row.querySelector("[type=number]").value)),
          number = input => (input.value === "" ? undefined : Number(input.value));
        const made = await post("/v1/datasets", {
          files: rows.map(row => row.dataset.key),
          weights: weights.some(weight => weight !== 1) ? weights : undefined,
          name: name.value,
          deduplicate: duplicates.value,
          similarity: duplicates.value === "near" ? number(similarity) : undefined,
          validation_share: number(share),
          encoder: encoder.value || undefined,
          vocab_size: encoder.value ? undefined : number(vocabulary),
          min_chars: number(least),
          max_chars: number(most),
          errors: errors.value
        });
        say(formStatus, `The dataset ${named(made)} is ${made.status}.`);
        await self.refresh();
        list.querySelector(`[data-key="${made.id}"] h4`)?.focus();
      })
    },
    el("h3", {}, "Build a dataset"),
    chosenSummary,
    el(
      "div",
      { class: "fields wide" },
      field("Name", name),
      field("Tokens", encoder, "How text becomes tokens."),
      field("Vocabulary", vocabulary, "As many tokens as are learned."),
      field("Share that validates", share, "Whole documents, which training never sees."),
      field("Duplicates", duplicates)
    ),
    el(
      "details",
      {},
      el("summary", {}, "More"),
      el(
        "div",
        { class: "fields wide" },
        field("Similar from", similarity, "Jaccard index, 0.3 to 1"),
        field("Fewest characters of a document", least),
        field("Most characters of a document", most),
        field("Bytes that are not UTF-8", errors)
      )
    ),
    el("button", { class: "first" }, "Build the dataset"),
    formError,
    formStatus
  );

  page.append(
    el(
      "div",
      { class: "columns" },
      el(
        "section",
        { class: "card", "aria-label": "Files" },
        el("h2", {}, "Files"),
        el("p", {}),
        zone.element,
        status,
        error,
        noFiles,
        fileList
      ),
      el("section", { class: "card", "aria-label": "New dataset" }, form)
    ),
    el(
      "section",
      { class: "card", "aria-label": "Datasets" },
      el("div", { class: "bar" }, el("h2", { tabindex: "-1" }, "Datasets"), disk),
      none,
      list
    ),
    el(
      "section",
      { class: "card", "aria-label": "Models" },
      el("h2", { tabindex: "-1" }, "Models"),
      modelError,
      noModels,
      modelList
    )
  );
  page.hidden = true;
  root.append(loading, page);

  const check = (id, is) => {
    const box = fileList.querySelector(`[data-key="${id}"] [type=checkbox]`);
    if (box) box.checked = is;
  };
  function summarize() {
    const chosen = (files ?? []).filter(
      file => fileList.querySelector(`[data-key="${file.id}"] [type=checkbox]`)?.checked
    );
    say(
      chosenSummary,
      chosen.length
        ? `${many(chosen.length, "file")} chosen, ${bytes(chosen.reduce((sum, file) => sum + file.bytes, 0))}.`
        : "Choose the files of which it is built. A file with weight 2 is read twice as often."
    );
  }

  /** Deletes something once a person has confirmed it. */
  const erase = (what, name, path, focus, own) =>
    doing(own, async () => {
      if (!confirm(`Delete ${name}?${what}`)) return;
      await remove(path);
      focus().focus();
      await self.refresh();
    });

  const fileRow = file =>
    el(
      "li",
      {},
      el(
        "div",
        { class: "row" },
        el(
          "label",
          { class: "check grow" },
          el("input", { type: "checkbox", onchange: summarize }),
          el("span", {}, file.filename)
        ),
        el("span", { class: "facts" }, `${bytes(file.bytes)}, ${ago(file.created_at)}`),
        el(
          "label",
          { class: "inline" },
          el("span", {}, "weight"),
          el("input", {
            type: "number",
            class: "weight",
            min: 0.001,
            max: 1000,
            step: "any",
            value: 1,
            "aria-label": `Weight of ${file.filename}`
          })
        ),
        button(
          "Delete",
          erase(
            " Datasets that were built of it stay.",
            file.filename,
            `/v1/files/${file.id}`,
            () => zone.element.querySelector("input"),
            error
          ),
          { class: "small danger", "aria-label": `Delete ${file.filename}` }
        )
      ),
      preview(`/v1/files/${file.id}/documents?limit=3`)
    );

  const modelRow = model =>
    el(
      "li",
      { class: "row" },
      el("span", { class: "grow" }, model.id),
      el("span", { class: "facts" }),
      el("a", { class: "button small", href: `#/write?model=${encodeURIComponent(model.id)}` }, "Write with it"),
      button(
        "Delete",
        erase(
          " Its file is removed from the server's disk for good.",
          model.id,
          `/v1/models/${encodeURIComponent(model.id)}`,
          () => page.querySelector("[aria-label=Models] h2"),
          modelError
        ),
        { class: "small danger", "aria-label": `Delete the model ${model.id}` }
      )
    );

  function datasetRow(dataset) {
    const own = el("p", { class: "error", role: "alert" });
    return el(
      "li",
      {},
      el(
        "div",
        { class: "row" },
        el("h4", { class: "grow", tabindex: "-1" }, named(dataset)),
        el("span", { class: "state" })
      ),
      el("progress", { max: 1, "aria-label": "Progress" }),
      el("p", { class: "facts" }),
      el("dl", { class: "numbers" }),
      own,
      el(
        "div",
        { class: "buttons" },
        el("a", { class: "button small use", href: `#/new?dataset=${dataset.id}` }, "Train on it"),
        button(
          "Cancel",
          doing(own, async () => {
            await ask(`/v1/datasets/${dataset.id}/cancel`, { method: "POST" });
            await self.refresh();
          }),
          { class: "small cancel" }
        ),
        button(
          "Delete",
          erase(
            " Its files, and the models trained on it, stay.",
            named(dataset),
            `/v1/datasets/${dataset.id}`,
            () => page.querySelector("[aria-label=Datasets] h2"),
            own
          ),
          { class: "small danger erase", "aria-label": `Delete the dataset ${named(dataset)}` }
        )
      )
    );
  }

  function updateDataset(row, dataset) {
    const { status, result, progress, recipe } = dataset,
      content = JSON.stringify(dataset);
    if (row.content === content) return;
    row.content = content;
    const part = selector => row.querySelector(selector),
      active = isActive(status);
    part(".state").replaceChildren(chip(status));
    part("progress").hidden = !active;
    part("progress").value = progress.done;
    say(part(".error"), dataset.error?.message ?? "");
    say(
      part(".facts"),
      active
        ? `${progress.phase}, ${Math.round(100 * progress.done)} %`
        : `${many(recipe.files.length, "file")}, built ${ago(dataset.created_at)}`
    );
    const out = result ? Object.entries(result.left_out).filter(([, n]) => n) : [];
    const facts = result
      ? [
          ["Documents", count(result.documents)],
          ["Tokens", `${size(result.training.tokens)} train, ${size(result.validation.tokens)} validate`],
          ["Vocabulary", count(result.encoder.vocab_size)],
          ["Bytes per token", (result.bytes / Math.max(1, result.tokens)).toFixed(2)],
          ["Left out", out.map(([why, n]) => `${count(n)} ${LEFT_OUT[why] ?? why}`).join(", ") || "nothing"],
          ["On disk", bytes(dataset.bytes)]
        ]
      : [];
    part("dl").replaceChildren(...facts.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))));
    part(".use").hidden = status !== "succeeded";
    part(".cancel").hidden = !active;
    part(".erase").hidden = status === "running";
    if (status === "succeeded" && !part("details"))
      row.append(
        preview(`/v1/datasets/${dataset.id}/documents?limit=3`, "First documents of training"),
        preview(`/v1/datasets/${dataset.id}/documents?limit=3&split=validation`, "First documents of validation")
      );
  }

  const self = {
    async refresh() {
      let models, use;
      try {
        [files, datasets, models, use] = (
          await Promise.all(
            ["/v1/files?limit=1000", "/v1/datasets?limit=100", "/v1/models", "/v1/disk"].map(path => get(path))
          )
        ).map(answer => answer.data ?? answer);
      } catch (problem) {
        if (page.hidden) loading.replaceChildren(problem.status === 401 ? "" : problem.message);
        throw problem;
      }
      loading.hidden = true;
      page.hidden = false;
      say(noFiles, files.length ? "" : "No files yet.");
      const few = datasets.length ? "" : "No datasets yet. A run on a file builds one by itself; here you choose how.";
      say(none, datasets.length === 100 ? "The newest 100 are shown." : few);
      say(
        disk,
        `On disk: files ${bytes(use.files)}, datasets ${bytes(use.datasets)}, runs ${bytes(use.runs)}, models ${bytes(use.models)}; ${bytes(use.free)} free`
      );
      offer(encoder, {
        "": [
          ["", "learned from the text"],
          ["chars", "a token for each character"]
        ],
        "The tokens of a dataset": datasets.filter(d => d.status === "succeeded").map(d => [d.id, named(d)]),
        "Of a model": models.map(m => [m.id, m.id])
      });
      keep(fileList, files, file => file.id, fileRow);
      say(noModels, models.length ? "" : "No models yet.");
      keep(
        modelList,
        models,
        model => model.id,
        modelRow,
        (row, model) =>
          say(row.querySelector(".facts"), `${model.arch}, ${bytes(model.bytes)}${model.loaded ? ", in memory" : ""}`)
      );
      keep(list, datasets, dataset => dataset.id, datasetRow, updateDataset);
      summarize();
      return datasets.some(dataset => isActive(dataset.status));
    }
  };
  return self;
}
