// The conversation. What a model says only ever becomes text: nothing here parses HTML.

import { Problem, count, events } from "/page/api.js";

const $ = (id) => document.getElementById(id);
let models = [];
let turns = []; // {role, content}
let running = null; // what stops the answer that is being written

const random = () => `page-${Array.from(crypto.getRandomValues(new Uint8Array(4)), (b) => b.toString(16).padStart(2, "0")).join("")}`;
const chosen = () => models.find((m) => m.name === $("model").value);
const talks = () => chosen()?.chat_template !== false;

/** Show the models that there are: entries of /v1/engine. */
export function offer(given) {
  const same = given.length === models.length && given.every((m, i) => m.name === models[i].name);
  models = given;
  if (same) return;
  const before = $("model").value;
  $("model").replaceChildren(...given.map((m) => new Option(m.name, m.name, false, m.name === before)));
  fit();
}

/** What the page says and offers follows from the model. */
function fit() {
  const model = chosen();
  if (!model) return;
  $("chat").classList.toggle("plain", !talks());
  $("system").disabled = !talks();
  $("prompt").placeholder = talks() ? "Message" : "Text to continue";
  $("empty-text").textContent = talks() ? `Ask ${model.name} something.`
    : `${model.name} has no chat template: it continues the text that you write.`;
  $("most").max = model.max_model_len;
  $("most").value = Math.min(Number($("most").value), Math.max(1, Math.floor(model.max_model_len / 4)));
  if (!model.prefix_cache.enabled) $("session").value = "";
  $("session").disabled = !model.prefix_cache.enabled;
}

export function reset() {
  running?.abort();
  turns = [];
  for (const each of $("log").querySelectorAll(".turn")) each.remove();
  $("empty").hidden = false;
  if (!$("session").disabled) $("session").value = random();
  $("prompt").focus();
}

function turn(role, name) {
  const made = $("turn-template").content.cloneNode(true).firstElementChild;
  made.classList.add(role);
  made.querySelector("h3").textContent = name;
  $("empty").hidden = true;
  $("log").append(made);
  return made;
}

/** Put `text` into `place`; between lines of ``` it is code. */
function write(place, text) {
  if (!text.includes("```")) {
    if (place.childNodes.length !== 1 || place.firstChild.nodeType !== Node.TEXT_NODE) place.textContent = text;
    else if (text.length > place.firstChild.length) place.firstChild.appendData(text.slice(place.firstChild.length));
    return;
  }
  const parts = text.split(/^```[^\n`]*\n?/m);
  place.replaceChildren(...parts.flatMap((part, i) => {
    if (!(i % 2)) return part ? [document.createTextNode(part.replace(/^\n|\n+$/g, ""))] : [];
    const code = document.createElement("pre");
    code.textContent = part.replace(/\n$/, "");
    return [code];
  }));
}

function request() {
  const body = {
    model: $("model").value, stream: true, stream_options: { include_usage: true },
    temperature: Number($("temperature").value), max_tokens: Number($("most").value),
  };
  if ($("session").value) body.session_id = $("session").value;
  if (!talks()) return ["/v1/completions", { ...body, prompt: turns.map((t) => t.content).join("") }];
  const system = $("system").value.trim();
  return ["/v1/chat/completions", { ...body, messages: [...(system ? [{ role: "system", content: system }] : []), ...turns] }];
}

/** "12 tokens · 30.1 tok/s ..." */
function facts(seen) {
  const said = [];
  if (seen.first) said.push(`first token after ${((seen.first - seen.start) / 1000).toFixed(2)} s`);
  if (seen.usage) {
    const { completion_tokens: made, prompt_tokens: prompt, prompt_tokens_details: details } = seen.usage;
    said.push(`${count(made)} tokens`);
    if (made > 1 && seen.last > seen.first) said.push(`${((made - 1) * 1000 / (seen.last - seen.first)).toFixed(1)} tok/s`);
    said.push(`${count(details?.cached_tokens || 0)} of ${count(prompt)} prompt tokens cached`);
  }
  if (seen.reason === "length") said.push("cut at max tokens");
  if (seen.stopped) said.push("stopped");
  return said.join(" · ");
}

async function send() {
  const asked = $("prompt").value;
  if (running || !asked.trim() || !$("model").value) return;
  for (const each of [$("temperature"), $("most")]) {
    if (each.checkValidity()) continue;
    each.closest("details").open = true;
    each.reportValidity();
    return;
  }
  $("prompt").value = "";
  turns.push({ role: "user", content: asked });
  write(turn("user", "You").querySelector(":scope > .text"), asked);
  const place = turn("assistant", $("model").value);
  const [path, body] = request();
  const mine = turns;
  const stop = running = new AbortController();
  busy(true);
  place.classList.add("waiting");
  const seen = { start: performance.now(), text: "", thoughts: "" };
  let drawing = 0;
  const draw = () => {
    drawing = 0;
    const log = $("log"), bottom = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
    write(place.querySelector(":scope > .text"), seen.text);
    if (seen.thoughts) {
      const box = place.querySelector(".thoughts");
      if (box.hidden) box.hidden = false, box.open = true;
      write(box.querySelector(".text"), seen.thoughts);
    }
    if (bottom) log.scrollTop = log.scrollHeight;
  };
  $("log").scrollTop = $("log").scrollHeight;
  try {
    for await (const event of events(path, body, stop.signal)) {
      if (event.usage) seen.usage = event.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      seen.reason = choice.finish_reason || seen.reason;
      const text = choice.text ?? choice.delta.content ?? "", thought = choice.delta?.reasoning ?? "";
      if (text || thought) {
        seen.last = performance.now();
        seen.first ||= seen.last;
      }
      seen.text += text;
      seen.thoughts += thought;
      drawing ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name === "AbortError") seen.stopped = true;
    else {
      const said = place.querySelector(".problem");
      said.textContent = error instanceof Problem ? error.message : `The page failed: ${error.message}`;
      said.hidden = false;
      if (!(error instanceof Problem)) console.error(error);
    }
  }
  cancelAnimationFrame(drawing);
  draw();
  place.classList.remove("waiting");
  if (seen.text || seen.thoughts) place.querySelector(".thoughts").open = !seen.text;
  place.querySelector(".facts").textContent = facts(seen) || " ";
  if (seen.text) mine.push({ role: "assistant", content: seen.text });
  else if (mine.at(-1)?.content === asked) {
    mine.pop(); // it was not answered: it can be asked again
    if (mine === turns && !$("prompt").value) $("prompt").value = asked;
  }
  running = null;
  busy(false);
  $("log").scrollTop = $("log").scrollHeight;
}

function busy(now) {
  const inside = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = now;
  $("stop").hidden = !now;
  $("log").setAttribute("aria-busy", String(now)); // the answer is read out when it is whole
  if (inside) (now ? $("stop") : $("prompt")).focus();
}

export function start() {
  $("session").value = random();
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", reset);
  $("model").addEventListener("change", () => {
    fit();
    if (turns.length) reset();
  });
}
