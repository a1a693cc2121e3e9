// The field of one key in the form of a new run.

import { button, el, field, lastPart, say, value } from "./dom.js";
import { choicesOf, isNumber, kinds, range } from "./schema.js";

const ARCH = "model_hyperparams.arch"; // is not changed here: another family has other keys

const hasOnlyChoices = one => choicesOf(one).length > 0 && !isNumber(one);

/** A select where there are only choices, else an input. */
function control(one) {
  const choices = choicesOf(one);
  if (hasOnlyChoices(one)) {
    const options = choices.map(choice => new Option(String(choice), String(choice)));
    return el("select", {}, options);
  }
  return el("input", {
    type: "text",
    inputmode: isNumber(one) && !choices.length ? "decimal" : null,
    autocomplete: "off",
    spellcheck: "false",
    placeholder: kinds(one).some(kind => kind.type === "null") ? "by itself" : null
  });
}

/** What the key means, its range, and the choices beside numbers. */
function hint(key, one) {
  const choices = choicesOf(one);
  const meaning = key === ARCH ? "the family; a preset of another family has another" : one.description;
  const others = choices.length && !hasOnlyChoices(one) ? `or ${choices.join(", ")}` : "";
  return [meaning, range(one), others].filter(Boolean).join("; ");
}

function inputText(to) {
  if (to === null || to === undefined) return "";
  if (typeof to === "string") return to;
  return JSON.stringify(typeof to === "number" && !Number.isInteger(to) ? Number(to.toPrecision(6)) : to);
}

export class KeyRow {
  /** one: the key's schema. onChange(key, text) gets what is typed; onPutBack(key) comes before the focus returns. */
  constructor(key, one, onChange, onPutBack) {
    this.key = key;
    this.words = `${key} ${one.description ?? ""}`.toLowerCase();
    this.input = control(one);
    this.input.disabled = key === ARCH;
    this.input.addEventListener(hasOnlyChoices(one) ? "change" : "input", () => onChange(key, this.input.value));
    this.element = field(lastPart(key), this.input, hint(key, one));
    const putBack = () => {
      onPutBack(key);
      this.input.focus();
    };
    this.was = el("span");
    this.mark = el(
      "p",
      { class: "mark" },
      this.was,
      button("Put back", putBack, { class: "small", "aria-label": `Put ${key} back` })
    );
    this.element.append(this.mark);
    this.element.dataset.key = key;
  }

  /** Shows the key's value, unless a person is typing there, and whether it is changed. */
  show(values) {
    if (document.activeElement !== this.input) this.input.value = inputText(values.current(this.key));
    this.showMark(values);
  }

  showMark(values) {
    const isChanged = values.isChanged(this.key);
    this.element.classList.toggle("changed", isChanged);
    this.mark.hidden = !isChanged;
    if (isChanged) say(this.was, `preset: ${value(values.original(this.key))}`);
  }

  /** Hides the key unless it has all the words. */
  showIf(words, isWanted) {
    this.element.hidden = !words.every(word => this.words.includes(word)) || !isWanted;
  }

  /** Marks the key if the server's message names it. */
  showProblem(text) {
    const isNamed = text && (text.includes(`${this.key} = `) || text.includes(`${this.key}: `));
    if (isNamed) this.input.setAttribute("aria-invalid", "true");
    else this.input.removeAttribute("aria-invalid");
  }
}
