// Several texts side by side, a card for each.

import { button, el } from "./dom.js";
import { Continuation, describeToken } from "./tokens.js";

export class Choices {
  /** onChoose(nodes) gets the nodes of the text with which a person goes on. */
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.element = el("div", { class: "choices" });
    this.element.addEventListener("mouseover", event => {
      const token = event.target.closest?.(".token");
      if (token) token.title = describeToken(token);
    });
  }

  clear() {
    this.element.replaceChildren();
  }

  /** Adds the card of a text that is to come. It can be chosen once it is finished. */
  add(model, seed) {
    const text = el("p", { class: "text" });
    const choose = button("Go on with this one", () => this.onChoose([...text.childNodes]), {
      class: "small",
      disabled: true
    });
    const seedLine = el("p", { class: "hint" }, `seed ${seed}`);
    this.element.append(el("article", { class: "card" }, el("h4", {}, model), seedLine, text, choose));
    return new Continuation(text, model, seed, written => {
      choose.disabled = !written;
    });
  }

  /** Shows texts that were written before: [{model, seed, text}, …]. */
  putBack(texts) {
    for (const { model, seed, text } of texts) {
      const shown = this.add(model, seed);
      shown.add({ text });
      shown.finish();
    }
  }
}
