// Asks the server every few seconds whether it has another version of this page.
const version = {{ version|tojson }}, facts = document.querySelector("header .note"), told = facts.textContent;
setInterval(async () => {
  try {
    const now = (await fetch(location.href, {method: "HEAD", cache: "no-store"})).headers.get("ETag");
    facts.textContent = told;
    if (now !== version) location.reload();
  } catch {
    facts.textContent = `${told} (The server has ended; this is what it showed last.)`;
  }
}, 3000);
