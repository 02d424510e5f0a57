// The sessions, from /v1/sessions: pause, resume, close.

import { Problem, count, json } from "/page/api.js";

const $ = (id) => document.getElementById(id);
const rows = new Map(); // by model and id

function say(text, bad = false) {
  $("sessions-said").textContent = text;
  $("sessions-said").classList.toggle("bad", bad);
}

function row(session) {
  const name = JSON.stringify([session.model, session.id]);
  if (rows.has(name)) return rows.get(name);
  const made = $("session-template").content.cloneNode(true).firstElementChild;
  made.querySelector(".name").textContent = session.id;
  const place = made.querySelector(".place"), time = made.querySelector(".time");
  place.setAttribute("aria-label", `Where ${session.id} waits`);
  time.setAttribute("aria-label", `How long ${session.id} waits`);
  for (const button of made.querySelectorAll("[data-do]")) {
    button.setAttribute("aria-label", `${button.textContent} ${session.id}`);
    button.addEventListener("click", () => act(button, session, place.value, Number(time.value)));
  }
  $("sessions-rows").prepend(made);
  rows.set(name, made);
  return made;
}

async function act(button, session, place, seconds) {
  const path = `/v1/sessions/${encodeURIComponent(session.id)}`, what = button.dataset.do;
  const body = what === "pause" ? { model: session.model, seconds, place } : { model: session.model };
  button.disabled = true;
  try {
    if (what === "close") {
      await json(`${path}?model=${encodeURIComponent(session.model)}`, { method: "DELETE" });
      say(`${session.id} is closed.`);
      $("sessions-title").focus(); // the button that had it is gone
    } else {
      const got = await json(`${path}/${what}`, { method: "POST", body });
      say(`${session.id}: ${[got.status, `${got.blocks} blocks`, got.place, got.seconds && `${Math.round(got.seconds)} s`, got.why]
        .filter(Boolean).join(", ")}`, got.status === "rejected");
    }
  } catch (error) {
    say(error instanceof Problem ? error.message : String(error), true);
  }
  button.disabled = false;
  await update().catch(failed);
}

function where(session) {
  const places = [[session.pooled, "in the pool"], [session.in_ram, "in memory"], [session.on_disk, "on disk"]];
  const gone = session.blocks - session.pooled - session.in_ram - session.on_disk;
  const said = places.filter(([n]) => n).map(([n, place]) => `${count(n)} ${place}`);
  if (gone > 0) said.push(`${count(gone)} gone`);
  return said.join(", ") || "less than a block";
}

/** No news of the sessions: an engine that is busy or away says so in its own part. */
export function failed() {
  $("sessions-note").textContent = "no answer";
}

/** Ask again and show. */
export async function update() {
  const { data } = await json("/v1/sessions", { signal: AbortSignal.timeout(5000) });
  const seen = new Set();
  for (const session of data) {
    const made = row(session);
    seen.add(made);
    made.querySelector(".size").textContent = `${count(session.tokens)} tokens, ${session.model}`;
    made.querySelector(".where").textContent = where(session);
    made.querySelector(".lease").textContent = [session.leased_seconds > 0 && `leased for ${Math.ceil(session.leased_seconds)} s`,
      session.saved && "saved"].filter(Boolean).join(", ") || " ";
  }
  for (const [name, made] of rows) {
    if (seen.has(made)) continue;
    made.remove();
    rows.delete(name);
  }
  $("sessions-table").hidden = !data.length;
  $("sessions-none").hidden = data.length > 0;
  $("sessions-note").textContent = data.length ? count(data.length) : " ";
}
