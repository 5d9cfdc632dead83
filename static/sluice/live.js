// Shows a key's figures anew when more usage of it was stored. The server says only that there is some; the figures come with
// the page itself, fetched again. Without this script, or without the connection, a reload shows the same.

import { localize } from "./page.js";

const source = document.querySelector("[data-live-from]");
const key = Number(source.dataset.liveKey);
const address = new URL(source.dataset.liveFrom, location.href);
address.protocol = address.protocol === "https:" ? "wss:" : "ws:";

// A busy key has new rows twice a second. Nobody reads so fast.
const SOON_MS = 300;
const EVERY_MS = 5000;
// Between attempts to connect, twice as long each time.
const FIRST_PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 60000;
const MOST_REFUSALS = 5;

let socket = null;
let pause = FIRST_PAUSE_MS;
let refusals = 0;
let missed = false; // something may have happened that we did not hear of
let waiting = false; // a refresh will come
let stale = false; // it came while nobody looked
let refreshed = 0;
const shown = new Map(); // what was put in last, by the name of its part

function connect() {
  let opened = false;
  socket = new WebSocket(address);
  socket.addEventListener("open", () => {
    opened = true;
    refusals = 0;
    pause = FIRST_PAUSE_MS;
    source.dataset.live = "on";
    if (missed) soon();
    missed = false;
  });
  socket.addEventListener("message", (event) => {
    const { keys } = JSON.parse(event.data);
    if (keys === null || keys.includes(key)) soon();
  });
  socket.addEventListener("close", () => {
    source.dataset.live = "off";
    socket = null;
    missed = true;
    if (!opened) refusals += 1;
    if (refusals >= MOST_REFUSALS) return;
    setTimeout(connect, pause * (0.5 + Math.random()));
    pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
  });
}

function soon() {
  if (waiting) return;
  waiting = true;
  setTimeout(refresh, Math.max(SOON_MS, refreshed + EVERY_MS - Date.now()));
}

async function refresh() {
  waiting = false;
  stale = document.hidden;
  if (stale) return;
  refreshed = Date.now();
  try {
    const answer = await fetch(location.href, { headers: { accept: "text/html" } });
    // Signed out meanwhile, or the key is no longer one's own: a reload will say so.
    if (!answer.ok || answer.redirected) return;
    show(new DOMParser().parseFromString(await answer.text(), "text/html"));
  } catch {
    missed = true; // the server is away: when it is back, so is the connection
  }
}

const parts = (page) => new Map([...page.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));

function show(page) {
  const before = parts(document);
  const after = parts(page);
  // The first request of a key brings the chart, which comes with scripts of its own.
  if ([...after.keys()].join() !== [...before.keys()].join()) return location.reload();
  for (const [name, part] of after) {
    const old = before.get(name);
    const html = part.outerHTML;
    if (shown.get(name) === html || isInUse(old)) continue;
    shown.set(name, html);
    const fresh = document.importNode(part, true);
    localize(fresh);
    old.replaceWith(fresh);
  }
  document.dispatchEvent(new CustomEvent("figureschange"));
}

// Nothing is taken from under somebody's hands.
function isInUse(part) {
  const selection = getSelection();
  return part.contains(document.activeElement) || (selection.type === "Range" && selection.containsNode(part, true));
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && stale) soon();
});
// A page that is kept for the way back keeps no connection; when it is shown again it begins anew.
addEventListener("pagehide", () => {
  if (socket?.readyState === WebSocket.OPEN) socket.close();
});

connect();
