// Starts the page, asks for news each second while somebody looks, and shows whether there is an answer.

import { Problem, json, key, wanted } from "/page/api.js";
import * as chat from "/page/chat.js";
import * as engine from "/page/engine.js";
import * as sessions from "/page/sessions.js";

const $ = (id) => document.getElementById(id);
let looks = 0, timer = 0;

function link(text, kind) {
  $("link").className = `link ${kind}`;
  if ($("link-text").textContent !== text) $("link-text").textContent = text;
  document.body.classList.toggle("away", kind === "bad");
}

async function look() {
  clearTimeout(timer);
  if (document.hidden) return;
  const mine = ++looks;
  let wait = 1000;
  try {
    const { data } = await json("/v1/engine", { signal: AbortSignal.timeout(5000) });
    chat.offer(data);
    engine.update(data);
    const bad = data.filter((e) => e.state !== "ready");
    link(bad.length ? `${bad[0].name} is ${bad[0].state}` : "ready", bad.length ? "bad" : "good");
    await sessions.update().catch(sessions.failed);
  } catch (error) {
    const problem = error instanceof Problem ? error : new Problem("The server does not answer.", 0);
    link(problem.status ? problem.message : "no answer", "bad");
    if (problem.status === 401) wait = 0; // until there is another key
  }
  if (mine === looks && wait) timer = setTimeout(look, wait);
}

wanted.key = () => {
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
};
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  look();
  $("prompt").focus();
});
$("key-forget").addEventListener("click", () => {
  key.set("");
  $("key").value = "";
  look();
});
for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.show;
    for (const each of document.querySelectorAll("[data-show]")) each.setAttribute("aria-pressed", String(each === button));
  });
}
document.addEventListener("visibilitychange", look);
chat.start();
look();
