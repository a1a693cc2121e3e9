// The tokens of a text that a model wrote, as elements that know their probability.

import { el } from "./dom.js";

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

/** Collects the pieces of one text, and shows them in `target` as they come. */
export class Continuation {
  constructor(target, model, seed) {
    Object.assign(this, { target, model, seed, text: "", reason: null, logprobs: null });
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
  }
}
