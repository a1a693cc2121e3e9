// Writing with models: prompt and continuation in one editor, several texts side by side, each token's probability.

import { get } from "./api.js";
import { button, doing, el, empty, say, sayProblem } from "./dom.js";
import { Continuation } from "./tokens.js";
import { Choices } from "./write_choices.js";
import { Editor } from "./write_editor.js";
import { History, recall, store } from "./write_history.js";
import { ModelChoice } from "./write_models.js";
import { Settings } from "./write_settings.js";
import { Stream } from "./write_stream.js";

export const title = "Write";

export function mount(root, { query }) {
  const view = new WritePage(query.get("model"));
  root.append(view.loading, view.none, view.page);
  return view;
}

const noModel = () =>
  empty(
    "No model yet",
    "A model appears here as soon as a run has finished, or its first checkpoint is saved.",
    el("a", { class: "button first", href: "#/first" }, "Train your first model")
  );

class WritePage {
  /** wanted: the model that the address names; null where it names none. */
  constructor(wanted) {
    this.stream = null; // what is being written
    this.prompt = null; // of the texts that are shown; null while there are none
    this.seed = null; // of the first of them
    this.isLoaded = false;
    const kept = recall("write", {}),
      keep = () => this.keepSettings();
    this.settings = new Settings(kept, keep);
    this.models = new ModelChoice(kept.model, wanted, keep);
    this.choices = new Choices(nodes => this.choose(nodes));
    this.history = new History(one => this.putBack(one));
    this.makeEditor(kept.shade ?? true);
    this.makeButtons();
    this.loading = el("p", { class: "loading" }, "Loading the models …");
    this.none = el("div");
    this.page = this.makePage();
    this.page.hidden = true;
    this.showShade();
    this.show();
  }

  makeEditor(isShaded) {
    this.error = el("p", { class: "error", role: "alert" });
    this.status = el("p", { class: "hint", role: "status" });
    this.start = doing(this.error, () => this.write());
    this.editor = new Editor({
      isBusy: () => this.stream !== null,
      onEdit: () => this.show(),
      onReplace: () => this.start()
    });
    this.shade = el("input", {
      type: "checkbox",
      checked: isShaded,
      onchange: () => {
        this.keepSettings();
        this.showShade();
      }
    });
  }

  makeButtons() {
    this.go = button("Write", () => this.start(), { class: "first" });
    this.again = button("Regenerate", () => {
      this.editor.text = this.prompt;
      this.start();
    });
    this.stop = button("Stop", () => this.stream?.stop());
    this.clear = button("Clear", () => this.forget());
    this.reuse = button("Use this seed again", () => this.useSeed(), { class: "small" });
  }

  makePage() {
    const history = el(
      "section",
      { class: "card", "aria-label": "History" },
      el("h3", {}, "History"),
      el("p", { class: "hint" }, "Kept in this browser only."),
      this.history.element
    );
    return el(
      "div",
      { class: "columns wide-left", onkeydown: event => this.onKey(event) },
      el("div", {}, this.makeTextCard(), this.choices.element),
      el("div", {}, this.settings.makeCard(this.models.others), history)
    );
  }

  makeTextCard() {
    return el(
      "section",
      { class: "card writing", "aria-label": "Text" },
      el(
        "div",
        { class: "bar" },
        el("label", { class: "inline grow" }, el("span", {}, "Model"), this.models.select),
        el("label", { class: "check" }, this.shade, "shade unlikely tokens")
      ),
      this.editor.element,
      this.editor.popover.element,
      el(
        "div",
        { class: "buttons" },
        this.go,
        this.again,
        this.stop,
        this.clear,
        el("span", { class: "hint" }, "Ctrl+Enter writes, Escape stops")
      ),
      this.error,
      el("div", { class: "bar tight" }, this.status, this.reuse)
    );
  }

  // ---- what app.js calls ----

  async refresh() {
    try {
      const { data } = await get("/v1/models");
      this.isLoaded = true;
      this.loading.hidden = true;
      this.page.hidden = !this.models.show(data);
    } catch (problem) {
      if (!this.isLoaded) sayProblem(this.loading, problem);
      throw problem;
    }
    this.none.replaceChildren(...(this.page.hidden ? [noModel()] : []));
    return false;
  }

  leave() {
    this.stream?.stop();
    this.editor.popover.leave();
  }

  // ---- writing ----

  async write() {
    const { editor, settings, choices } = this;
    editor.popover.hide();
    this.prompt = editor.text;
    this.seed = settings.chooseSeed();
    const stream = new Stream(this.models.chosen(), settings.sampleCount, this.seed);
    choices.clear();
    this.stream = stream;
    this.show();
    this.stop.focus();
    say(this.status, "Writing …");
    await stream.run({ ...settings.options(), prompt: this.prompt, logprobs: 5 }, (model, seed) =>
      stream.isSingle ? new Continuation(editor.element, model, seed) : choices.add(model, seed)
    );
    this.stream = null;
    this.showEnd(stream);
    stream.throwProblems();
  }

  /** Shows how the texts ended, and keeps them. */
  showEnd(stream) {
    const { texts, isSingle, isStopped: stopped } = stream;
    say(this.status, stream.statusText());
    if (texts.some(one => one.text))
      this.history.add({ prompt: this.prompt, settings: this.settings.values(), stopped, found: texts });
    const isFocused = document.activeElement === this.stop;
    this.show();
    if (isFocused) (isSingle ? this.editor.element : this.go).focus();
    if (isSingle) this.editor.caretToEnd();
    this.editor.keepDraft();
  }

  /** Goes on with one of several texts. */
  choose(nodes) {
    this.editor.goOn(this.prompt, nodes);
    this.choices.clear();
  }

  /** Shows texts that were written before. */
  putBack({ prompt, settings, texts }) {
    this.settings.put(settings);
    this.models.choose(texts[0].model);
    this.prompt = prompt;
    this.seed = texts[0].seed;
    this.choices.clear();
    this.editor.text = prompt + (texts.length === 1 ? texts[0].text : "");
    if (texts.length > 1) this.choices.putBack(texts);
    this.show();
    this.editor.element.focus();
  }

  forget() {
    this.editor.text = "";
    this.choices.clear();
    this.prompt = null;
    this.show();
    this.editor.element.focus();
  }

  useSeed() {
    const { seed } = this.settings.inputs;
    seed.value = this.seed;
    this.keepSettings();
    this.show();
    seed.focus();
  }

  onKey(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !this.stream) {
      event.preventDefault();
      this.start();
    }
    if (event.key === "Escape") {
      if (this.stream) this.stream.stop();
      else this.editor.popover.hide();
    }
  }

  // ---- what is shown and kept ----

  show() {
    const { editor, prompt, seed } = this,
      isBusy = this.stream !== null;
    this.page.classList.toggle("busy", isBusy);
    editor.setBusy(isBusy);
    this.go.hidden = this.clear.hidden = isBusy;
    this.stop.hidden = !isBusy;
    const hasContinuation = prompt !== null && editor.text !== prompt && editor.text.startsWith(prompt);
    this.again.hidden = isBusy || !hasContinuation;
    this.reuse.hidden = isBusy || seed === null || this.settings.inputs.seed.value === String(seed);
  }

  showShade() {
    this.page.classList.toggle("shade", this.shade.checked);
  }

  keepSettings() {
    store("write", { ...this.settings.keptValues(), shade: this.shade.checked, model: this.models.value });
  }
}
