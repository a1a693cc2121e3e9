// What the page asks of the server. Errors come in the server's words.

let key = sessionStorage.getItem("key") ?? "";
let askForKey = () => {};
let waits = false; // for a key: nothing is asked meanwhile, since the browser would ask for one each time
const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});
export const DOWN = "The server does not answer. Does it still run? The page tries again every two seconds.";

export const onKeyNeeded = action => {
  askForKey = action;
};
export const hasKey = () => key !== "";

/** Keeps a key in this tab, if the server takes it. */
export async function giveKey(text) {
  key = text;
  waits = false;
  await ask("/v1/models");
  sessionStorage.setItem("key", key);
}

/** What the server answers. Throws an Error in the server's words. `path` begins with /. */
export async function ask(path, { method = "GET", json, signal } = {}) {
  if (waits) throw Object.assign(new Error("The server asks for a key."), { status: 401 });
  const headers = authorization();
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const body = json === undefined ? undefined : JSON.stringify(json);
  let answer;
  try {
    // with a key of ours the browser must neither ask for one nor send the one that was typed into its own dialog
    answer = await fetch(location.origin + path, {
      method,
      headers,
      body,
      signal,
      cache: "no-store",
      credentials: key ? "omit" : "same-origin"
    });
  } catch (problem) {
    throw problem.name === "AbortError" ? problem : Object.assign(new Error(DOWN), { down: true });
  }
  if (!answer.ok) throw refusal(answer.status, await answer.text());
  if (method !== "GET" && !/completions|estimates/.test(path)) dispatchEvent(new Event("changed")); // see app.js
  return answer;
}

export const get = async (path, options) => (await ask(path, options)).json();
export const post = (path, json, signal) => get(path, { method: "POST", json, signal });
export const remove = path => ask(path, { method: "DELETE" });

function refusal(status, text) {
  let message = `The server answered ${status}.`;
  let code = null;
  try {
    ({ message, code } = JSON.parse(text).error);
  } catch {
    /* not the server's own words */
  }
  if (status === 401) {
    waits = true;
    askForKey(key !== "");
  }
  return Object.assign(new Error(message), { status, code });
}

const MOST_LINES = 4000; // the server sends fewer of a long run when all are asked for

/** The lines of a run's metrics, which is at `step`. Of a run whose lines are known only the new ones are asked for. */
export async function metrics(id, step, known = []) {
  const last = known.at(-1)?.step ?? -1;
  const kept = step < last || known.length > MOST_LINES ? [] : known.filter(line => line.step < last);
  const { data } = await get(`/v1/runs/${id}/metrics?after=${kept.length ? last - 1 : -1}`);
  return [...kept, ...data];
}

/** The data of each server-sent event of an answer, wherever the network cut it into pieces. */
export async function* events(answer) {
  const reader = answer.body.getReader(),
    decoder = new TextDecoder();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      rest += value ? decoder.decode(value, { stream: true }) : decoder.decode();
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Sends one file. fetch does not tell how far an upload is; XMLHttpRequest does. Resolves to the stored file. */
export function upload(file, progress = () => {}, signal = undefined) {
  return new Promise((resolve, reject) => {
    const form = new FormData(),
      sending = new XMLHttpRequest();
    form.append("purpose", "fine-tune");
    form.append("file", file);
    sending.open("POST", `${location.origin}/v1/files`);
    for (const [name, value] of Object.entries(authorization())) sending.setRequestHeader(name, value);
    sending.upload.onprogress = event => progress(event.loaded / event.total);
    sending.onload = () =>
      sending.status === 200
        ? resolve(JSON.parse(sending.responseText))
        : reject(refusal(sending.status, sending.responseText));
    sending.onerror = () => reject(new Error(DOWN));
    sending.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal?.addEventListener("abort", () => sending.abort());
    sending.send(form);
  });
}

/** Saves what is at `path` under a name. A link can't send a key that only this tab knows. */
export async function download(path, name) {
  const link = document.createElement("a");
  link.download = name;
  link.href = key ? URL.createObjectURL(await (await ask(path)).blob()) : path;
  link.click();
  if (key) setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Streams a completion. `onChunk(choice)` gets each piece; resolves to the usage. Throws where the text broke off. */
export async function complete(body, onChunk, signal) {
  const answer = await ask("/v1/completions", {
    method: "POST",
    signal,
    json: { ...body, stream: true, stream_options: { include_usage: true } }
  });
  let done = false,
    usage = null;
  for await (const data of events(answer)) {
    if (data === "[DONE]") {
      done = true;
      break;
    }
    const piece = JSON.parse(data);
    if (piece.error) throw new Error(piece.error.message);
    for (const choice of piece.choices) onChunk(choice);
    usage = piece.usage ?? usage;
  }
  if (!done) throw new Error("The text broke off: the server went away.");
  return usage;
}
