const health = document.getElementById("health");
const example = document.getElementById("example");
const here = new URL(".", location.href).href.replace(/\/$/, "");
const firstJob = example.textContent.replace("http://127.0.0.1:8000", here);

function sentence(state) {
  const workers = state.workers === 1 ? "1 worker" : `${state.workers} workers`;
  return `${state.status}: ${workers}, ${state.running} running, ${state.queue_size} queued, database ${state.database}, Redis ${state.redis}`;
}

async function look() {
  try {
    const state = await (await fetch("health")).json();
    health.textContent = sentence(state);
    example.textContent = firstJob.replace("celeriac-mini", state.models[0] ?? "celeriac-mini");
    health.className = { ok: "", degraded: "so-so" }[state.status] ?? "bad";
  } catch {
    health.textContent = "The server does not answer.";
    health.className = "bad";
  }
}

example.textContent = firstJob;
look();
setInterval(look, 5000);
