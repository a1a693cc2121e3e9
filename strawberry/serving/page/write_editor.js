// The editor of prompt and continuation: its text, the caret, and the token at the mouse or at the caret.

import { el } from "./dom.js";
import { TokenPopover, tokens } from "./tokens.js";
import { recall, store } from "./write_history.js";

const ATTRIBUTES = {
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
};

export class Editor {
  /** isBusy() → whether a model writes; onEdit() is called when a person has changed the text, and onReplace() when
      another token was put in the place of one, from which the model is to write on. */
  constructor({ isBusy, onEdit, onReplace }) {
    this.element = el("div", ATTRIBUTES);
    // "plaintext-only" takes no formatting from what is pasted; an older browser does not know it
    this.editable = this.element.contentEditable === "plaintext-only" ? "plaintext-only" : "true";
    this.text = recall("draft", "");
    this.popover = new TokenPopover(this.element, {
      isBusy,
      onReplace: (token, text) => {
        replaceToken(token, text);
        onReplace();
      }
    });
    this.element.addEventListener("input", () => {
      this.freeChangedTokens();
      this.popover.hide();
      this.keepDraft();
      onEdit();
    });
  }

  get text() {
    return this.element.textContent;
  }

  set text(text) {
    this.element.textContent = text;
  }

  /** Goes on with `nodes` after a prompt. */
  goOn(prompt, nodes) {
    this.text = prompt;
    this.element.append(...nodes);
    this.keepDraft();
    this.element.focus();
    this.caretToEnd();
  }

  /** What a person has changed is no token of the model's. */
  freeChangedTokens() {
    for (const token of this.element.querySelectorAll(".token")) {
      if (token.textContent !== tokens.get(token)?.part) token.replaceWith(document.createTextNode(token.textContent));
    }
  }

  keepDraft() {
    store("draft", this.text);
  }

  /** While a model writes, nobody else does. */
  setBusy(isBusy) {
    if (isBusy) this.element.setAttribute("aria-busy", "true");
    else this.element.removeAttribute("aria-busy");
    this.element.contentEditable = isBusy ? "false" : this.editable;
  }

  caretToEnd() {
    const range = document.createRange();
    range.selectNodeContents(this.element);
    range.collapse(false);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    this.element.scrollTop = this.element.scrollHeight;
    this.popover.hide();
  }
}

/** Puts a text in the place of a token, and drops what followed. */
function replaceToken(token, text) {
  while (token.nextSibling) token.nextSibling.remove();
  token.replaceWith(document.createTextNode(text));
}
