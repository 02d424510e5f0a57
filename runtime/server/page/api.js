// Talks to the server that this page came from; keeps the key in this tab.

const KEY = "inferloom-key";
/** Called with no arguments when the server wants a key that it has not got. */
export const wanted = { key: () => {} };

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY),
};

/** What went wrong, in words; `status` is 0 when there was no answer at all. */
export class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** A response that is fine. Problem, or AbortError when `signal` says so. */
export async function call(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer.", 0);
  }
  if (answer.ok) return answer;
  let message = "";
  try {
    message = (await answer.json()).error.message;
  } catch { /* not ours: the status says it */ }
  if (answer.status === 401) {
    wanted.key();
    message = key.get() ? "This API key is not valid here." : "This server wants an API key.";
  }
  const again = answer.headers.get("retry-after");
  throw new Problem((message || `The server answered ${answer.status}.`) + (again ? ` (again in ${again} s)` : ""), answer.status);
}

/** JSON at `path`. */
export async function json(path, options) {
  return (await call(path, options)).json();
}

/** The events of a stream as objects, until it says [DONE]. Problem when it breaks off, or says an error. */
export async function* events(path, body, signal) {
  const reader = (await call(path, { method: "POST", body, signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Problem("The connection broke off.", 0);
      }
      if (part.done) throw new Problem("The answer broke off.", 0);
      rest += part.value;
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (!block.startsWith("data: ")) continue; // a comment: nothing new yet
        const data = block.slice(6);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Problem(event.error.message, event.error.code || 500);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A number for people. */
export const count = (n) => n.toLocaleString("en");

/** Bytes for people. */
export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; n >= 1024 && at < units.length - 1; at++) n /= 1024;
  return `${n >= 100 || at === 0 ? Math.round(n) : n.toFixed(1)} ${units[at]}`;
}
