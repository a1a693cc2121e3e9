// The events of a run, newest first.

import { el, keep } from "./dom.js";
import { section } from "./run_section.js";

export class Events {
  constructor() {
    this.list = el("ul", { class: "events", tabindex: "0", "aria-label": "Events, newest first" });
    this.element = section("Events", this.list);
  }

  /** An event's key counts from the oldest, so that it stays the same when newer events come. */
  show({ events }) {
    keep(
      this.list,
      events.map((event, i) => ({ ...event, key: events.length - i })),
      event => `${event.key} ${event.message}`,
      event => el("li", { "data-level": event.level }, event.message)
    );
  }
}
