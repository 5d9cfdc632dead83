// Small conveniences: the theme switch, local times, copy buttons. Every page works without them.

const root = document.documentElement;

function chosenTheme() {
  return root.dataset.theme || "system";
}

function choose(theme) {
  if (theme === "system") delete root.dataset.theme;
  else root.dataset.theme = theme;
  try {
    if (theme === "system") localStorage.removeItem("theme");
    else localStorage.setItem("theme", theme);
  } catch {
    // It then lasts as long as the page.
  }
  document.dispatchEvent(new CustomEvent("themechange"));
}

// The switch may stand on a page twice, for narrow and wide screens.
function showChoice() {
  for (const radio of document.querySelectorAll("[data-theme-choice]")) radio.checked = radio.value === chosenTheme();
}
document.addEventListener("themechange", showChoice);
showChoice();

for (const radio of document.querySelectorAll("[data-theme-choice]")) {
  radio.addEventListener("change", () => choose(radio.value));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new CustomEvent("themechange")));

// Times are written in UTC by the server and shown in the viewer's own zone.
const moment = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "long" });
const clock = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium" });
const relative = new Intl.RelativeTimeFormat(undefined, { numeric: "auto" });
const styles = { moment, exact, clock, day };

function ago(at) {
  const seconds = (at - Date.now()) / 1000;
  const size = Math.abs(seconds);
  if (size < 45) return relative.format(0, "minute").replace(/^.*$/, "just now");
  if (size < 3600) return relative.format(Math.round(seconds / 60), "minute");
  if (size < 86400) return relative.format(Math.round(seconds / 3600), "hour");
  if (size < 86400 * 30) return relative.format(Math.round(seconds / 86400), "day");
  return day.format(at);
}

export function localize(part) {
  for (const element of part.querySelectorAll("time[data-show]")) {
    const at = new Date(element.dateTime);
    if (Number.isNaN(at.getTime())) continue;
    element.title = exact.format(at);
    element.textContent = element.dataset.show === "ago" ? ago(at) : (styles[element.dataset.show] || moment).format(at);
  }
}
localize(document);

// A copy button names what it copies by id, and says what came of it.
async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  const said = button.querySelector("[data-said]") || button;
  const before = said.textContent;
  try {
    await navigator.clipboard.writeText(source.textContent.trim());
    said.textContent = "Copied";
  } catch {
    // Without https the clipboard is closed: select it, so that one key press copies.
    getSelection().selectAllChildren(source);
    said.textContent = "Press Ctrl+C";
  }
  setTimeout(() => {
    said.textContent = before;
  }, 1600);
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copy(button));
}

// A key that is shown once does not come back with the browser's "back".
addEventListener("pagehide", () => {
  for (const element of document.querySelectorAll("[data-secret]")) element.textContent = "This key was shown once.";
});

// Open menus close when the attention goes elsewhere.
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details[data-menu][open]")) {
    if (!menu.contains(event.target)) menu.open = false;
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of document.querySelectorAll("details[data-menu][open]")) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});
