// The live view of the engines, from /v1/engine.

import { bytes, count } from "/page/api.js";

const OWNERS = ["in_use", "leased", "cached", "free"];
const POINTS = 120;
const shown = new Map(); // by model: its element, and what it has done lately

function article(name) {
  if (shown.has(name)) return shown.get(name);
  const element = document.getElementById("engine-template").content.cloneNode(true).firstElementChild;
  element.querySelector("h3").textContent = name;
  const stack = element.querySelector(".stack");
  for (const owner of OWNERS) {
    const part = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    part.setAttribute("class", owner);
    part.setAttribute("height", "1");
    stack.append(part);
  }
  document.getElementById("engines").append(element);
  const made = { element, last: null, generated: [], prompt: [] };
  shown.set(name, made);
  return made;
}

/** Tokens a second since the last look; nothing to say after a restart, or when no news has come. */
function rate(now, last, what) {
  const seconds = last ? now.time - last.time : 0;
  const made = last ? now.tokens[what] - last.tokens[what] : 0;
  return seconds > 0 && made >= 0 ? made / seconds : 0;
}

function spark(svg, points) {
  const most = Math.max(1, ...points) * 1.08;
  const start = POINTS - points.length;
  const line = points.map((p, i) => `${i ? "L" : "M"}${start + i + 1} ${(31 - 29 * p / most).toFixed(2)}`).join("");
  svg.querySelector(".line").setAttribute("d", line);
  svg.querySelector(".area").setAttribute("d", `${line}L${POINTS} 32L${start + 1} 32Z`);
}

const number = (n) => n >= 100 ? count(Math.round(n)) : n.toFixed(n ? 1 : 0);

/** Show one engine. */
function show(now) {
  const mine = article(now.name), { element } = mine;
  const put = (name, text) => { element.querySelector(`[data-is="${name}"]`).textContent = text; };
  const state = element.querySelector(".state");
  state.textContent = now.state;
  state.classList.toggle("bad", now.state !== "ready");
  element.querySelector(".about").textContent = `${now.architecture}, ${now.dtype} on ${now.chip}, up to ${count(now.max_model_len)} tokens`
    + (now.restarts ? `, started again ${now.restarts} times` : "");
  put("running", `${now.running} / ${now.max_num_seqs}`);
  put("waiting", count(now.waiting));
  put("batch", `${now.batch.sequences} × ${count(now.batch.sequences ? Math.round(now.batch.tokens / now.batch.sequences) : 0)}`);
  const { hits, queries, enabled } = now.prefix_cache;
  put("hits", !enabled ? "off" : queries ? `${Math.round(100 * hits / queries)} %` : "–");
  const fresh = !mine.last || now.time !== mine.last.time;
  for (const [what, name] of [["generated", "generated"], ["prompt", "prompt"]]) {
    const value = fresh ? rate(now, mine.last, what) : 0;
    mine[name].push(value);
    if (mine[name].length > POINTS) mine[name].shift();
    put(name, number(value));
  }
  element.querySelectorAll(".spark").forEach((svg, i) => spark(svg, i ? mine.prompt : mine.generated));
  blocks(element, now.blocks);
  for (const [name, tier] of Object.entries(now.tiers)) {
    element.querySelector(`[data-tier="${name}"] dd`).textContent =
      tier.capacity ? `${bytes(tier.bytes)} of ${bytes(tier.capacity)}` : "none";
  }
  mine.last = now;
}

function blocks(element, now) {
  const stack = element.querySelector(".stack");
  let at = 0;
  for (const owner of OWNERS) {
    const part = stack.querySelector(`.${owner}`), width = now.total ? 1000 * now[owner] / now.total : 0;
    part.setAttribute("x", at);
    part.setAttribute("width", width && Math.max(width, 3)); // one of many thousand is still seen
    at += width;
    element.querySelector(`.legend .${owner} b`).textContent = count(now[owner]);
  }
  stack.setAttribute("aria-label", `${count(now.total)} blocks: ` + OWNERS.map((o) => `${count(now[o])} ${o.replace("_", " ")}`).join(", "));
  element.querySelector('[data-is="blocks"]').textContent =
    `· ${count(now.total)} of ${now.tokens} tokens, ${bytes(now.total * now.bytes)}`;
}

/** Show all engines: entries of /v1/engine. */
export function update(engines) {
  for (const each of engines) show(each);
}
