// The page: which view is shown, the key, and the beat at which the view asks the server again.

import { ask, giveKey, onKeyNeeded } from "./api.js";
import { doing, say } from "./dom.js";
import * as runs from "./runs.js";
import * as run from "./run.js";
import * as newRun from "./new_run.js";
import * as write from "./write.js";
import * as data from "./data.js";
import * as first from "./first.js";

const $ = id => document.getElementById(id);
const BUSY_SECONDS = 2,
  IDLE_SECONDS = 10;
// A view is {title, mount(root, {id, query}) → {refresh() → whether anything runs, leave?()}}.
const VIEWS = { runs, new: newRun, write, data, first };

let shown = null,
  beat = null,
  turn = 0;

/** #/runs/ftjob-1?x=y as {name: "runs", id: "ftjob-1", query}. */
function address() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name = "", id = ""] = path.split("/");
  return { name, id: decodeURIComponent(id), query: new URLSearchParams(query) };
}

async function show() {
  const { name, id, query } = address(),
    mine = ++turn;
  let view = name === "runs" && id ? run : VIEWS[name];
  if (!view) view = (await isFirstVisit()) ? first : runs;
  if (mine !== turn) return;
  shown?.leave?.();
  $("view").replaceChildren();
  document.title = `${view.title} · Strawberry`;
  for (const link of document.querySelectorAll("nav a")) {
    const at = link.getAttribute("href") === `#/${name || "runs"}`;
    link.toggleAttribute("aria-current", at);
    if (at) link.setAttribute("aria-current", "page");
  }
  shown = view.mount($("view"), { id, query });
  scrollTo(0, 0);
  await go();
}

/** Whether there is neither a model nor a run. */
async function isFirstVisit() {
  try {
    const [models, all] = await Promise.all(["/v1/models", "/v1/runs"].map(path => ask(path).then(a => a.json())));
    return !models.data.length && !all.data.length;
  } catch {
    return false;
  }
}

/** Asks, and comes again: soon while something runs. Waits for the key where one is missing. */
export async function go() {
  clearTimeout(beat);
  const mine = shown;
  let busy = false;
  try {
    if (!document.hidden && mine) busy = await mine.refresh();
    showStatus("");
  } catch (problem) {
    showStatus(problem.status === 401 ? "" : problem.message, problem.down);
    busy = problem.down; // so that it is seen soon when it is there again
  }
  clearTimeout(beat);
  if ($("key-form").hidden) beat = setTimeout(go, 1000 * (busy ? BUSY_SECONDS : IDLE_SECONDS));
}

function showStatus(text, down = false) {
  say($("server-status"), text);
  $("server-status").classList.toggle("shown", text !== "");
  $("view").classList.toggle("stale", down);
}

onKeyNeeded(wasGiven => {
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("view").hidden = true;
  if (wasGiven) say($("key-error"), "The key that you gave is wrong, or not valid any more.");
  $("key").focus();
});

$("key-form").addEventListener(
  "submit",
  doing($("key-error"), async () => {
    const key = $("key").value.trim();
    if (/[^\x21-\x7e]/.test(key)) throw new Error("A key has ASCII characters only, and no spaces.");
    await giveKey(key);
    $("key").value = "";
    $("key-form").hidden = true;
    $("view").hidden = false;
    await show();
    $("view").focus();
  })
);

document.querySelector(".skip").addEventListener("click", event => {
  event.preventDefault();
  $("view").focus();
});
addEventListener("changed", () => {
  // something was asked of the server that may run now
  clearTimeout(beat);
  beat = setTimeout(go, 700);
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && $("key-form").hidden) go();
});
addEventListener("hashchange", show);
show();
