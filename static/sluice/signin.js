// Asks again and again whether a person has signed in elsewhere, as often as the vendor allows. Without it a button does.

const form = document.querySelector("[data-sign-in-poll]");

function later(seconds) {
  setTimeout(ask, Math.max(1, seconds) * 1000);
}

async function ask() {
  let said = {};
  try {
    const answer = await fetch(location.pathname, {
      method: "POST",
      headers: { accept: "application/json" },
      body: new URLSearchParams(new FormData(form)),
    });
    said = await answer.json();
  } catch {
    // The server is away for a moment.
  }
  if (said.go) location.assign(said.go);
  else later(said.wait_seconds || 10);
}

if (form) later(Number(form.dataset.signInPoll));
