// The tokens of a text that a model wrote, as elements that know their probability.

import { button, el } from "./dom.js";

export const tokens = new WeakMap(); // element of a token → {p, top: [[text, p], …]}

/** The elements of a text's tokens, or the text alone where the tokens do not make it up. */
export function tokenElements(text, logprobs) {
  const chars = Array.from(text),
    starts = logprobs.text_offset,
    found = [];
  for (let i = 0; i < starts.length; i++) {
    // offsets count from the prompt's begin, in code points
    const part = chars
      .slice(starts[i] - starts[0], i + 1 < starts.length ? starts[i + 1] - starts[0] : undefined)
      .join("");
    if (!part) continue; // a part of a character, or what came after a stop
    const p = Math.exp(logprobs.token_logprobs[i] ?? 0);
    const element = el("span", { class: `token p${p > 0.8 ? 4 : p > 0.5 ? 3 : p > 0.2 ? 2 : p > 0.05 ? 1 : 0}` }, part);
    const top = Object.entries(logprobs.top_logprobs?.[i] ?? {})
      .map(([t, logprob]) => [t, Math.exp(logprob)])
      .sort((a, b) => b[1] - a[1]);
    tokens.set(element, { p, top, part });
    found.push(element);
  }
  return found.map(element => element.textContent).join("") === text ? found : [document.createTextNode(text)];
}

/** Collects the pieces of one text, and shows them in `target` as they come. onFinish(text) gets the whole. */
export class Continuation {
  constructor(target, model, seed, onFinish = () => {}) {
    Object.assign(this, { target, model, seed, onFinish, text: "", reason: null, logprobs: null });
    this.node = document.createTextNode("");
    target.append(this.node);
  }

  add(choice) {
    this.text += choice.text;
    this.node.appendData(choice.text);
    this.reason = choice.finish_reason ?? this.reason;
    if (!choice.logprobs) return;
    const all = (this.logprobs ??= { tokens: [], token_logprobs: [], top_logprobs: [], text_offset: [] });
    for (const name of Object.keys(all)) all[name].push(...(choice.logprobs[name] ?? []));
  }

  finish() {
    if (this.logprobs?.text_offset.length) this.node.replaceWith(...tokenElements(this.text, this.logprobs));
    this.onFinish(this.text);
  }
}

const percent = p => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");
const visible = text => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣");

/** A token's probability and its alternatives, a line each. */
export function describeToken(element) {
  const { p, top } = tokens.get(element);
  return [percent(p), ...top.map(([text, p]) => `${visible(text)} ${percent(p)}`)].join("\n");
}

/** Shows the token of `editor` that the mouse or the caret is at, with its alternatives, each of which can be pressed:
    onReplace(element, text). Nothing is shown while isBusy(). */
export class TokenPopover {
  constructor(editor, { isBusy, onReplace }) {
    Object.assign(this, { editor, isBusy, onReplace, at: null, leaving: null });
    this.element = el("div", { class: "popover", role: "group", "aria-label": "Token" });
    editor.addEventListener("mouseover", event => {
      const token = event.target.closest?.(".token");
      if (token) this.show(token);
    });
    for (const part of [editor, this.element]) {
      part.addEventListener("mouseleave", () => {
        this.leaving = setTimeout(() => this.hide(), 250);
      });
      part.addEventListener("mouseenter", () => clearTimeout(this.leaving));
    }
    this.onCaret = () => {
      const selection = getSelection(),
        token = selection.anchorNode?.parentElement?.closest?.(".token");
      if (token && editor.contains(token) && document.activeElement === editor && selection.isCollapsed)
        this.show(token);
    };
    document.addEventListener("selectionchange", this.onCaret);
  }

  leave() {
    document.removeEventListener("selectionchange", this.onCaret);
  }

  hide() {
    this.element.classList.remove("shown");
    this.at?.classList.remove("at");
    this.at = null;
  }

  show(token) {
    clearTimeout(this.leaving);
    const known = tokens.get(token);
    if (token === this.at || this.isBusy()) return;
    this.hide();
    if (!known) return;
    this.at = token;
    token.classList.add("at");
    this.element.replaceChildren(
      el("p", {}, el("strong", {}, `“${visible(known.part)}”`), ` ${percent(known.p)}`),
      el(
        "ul",
        {},
        known.top.slice(0, 6).map(([text, p]) => this.row(token, text, p))
      )
    );
    this.place(token);
  }

  row(token, text, p) {
    const own = text === tokens.get(token).part,
      usable = !own && !text.startsWith("bytes:") && !text.startsWith("<|");
    const replace = () => {
      this.hide();
      this.onReplace(token, text);
    };
    return el(
      "li",
      { class: own ? "own" : null },
      usable
        ? button(visible(text), replace, { class: "small", title: "Write on from here with this" })
        : el("span", {}, visible(text)),
      el("meter", { min: 0, max: 1, value: p, "aria-hidden": "true" }),
      el("span", { class: "percent" }, percent(p))
    );
  }

  /** Below the token, within what surrounds the editor. */
  place(token) {
    const box = token.getClientRects()[0],
      outer = this.element.parentElement.getBoundingClientRect();
    this.element.classList.add("shown");
    const left = Math.min(box.left - outer.left, outer.width - this.element.offsetWidth - 8);
    this.element.style.left = `${Math.max(8, left)}px`;
    this.element.style.top = `${box.bottom - outer.top + 4}px`;
  }
}
