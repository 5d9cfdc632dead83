// Runs in the head, before anything is painted: a theme that was chosen is in force from the first pixel.
// Without a choice (or without this script) the style sheet follows the system.
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  let chosen = null;
  try {
    chosen = localStorage.getItem("theme");
  } catch {
    // Storage may be forbidden: then the system's theme it is.
  }
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
})();
