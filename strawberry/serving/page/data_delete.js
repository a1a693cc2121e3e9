// The button that deletes a file, a dataset or a model.

import { remove } from "./api.js";
import { button, doing } from "./dom.js";

/** Deletes what is at `path` once a person has confirmed it.
    name, effect: what the question says; focus() → the element that is focused afterwards;
    error: where a refusal is shown; refresh: shows what is left; attributes: of the button. */
export function deleteButton({ path, name, effect, focus, error, refresh }, attributes) {
  const erase = doing(error, async () => {
    if (!confirm(`Delete ${name}?${effect}`)) return;
    await remove(path);
    focus().focus();
    await refresh();
  });
  return button("Delete", erase, attributes);
}
