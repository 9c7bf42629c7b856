// The state of the installation, asked for every two seconds while the tab is visible, and its last ten minutes, which
// exist in this page only. All views read it from here, so there is one poll however many show it.

import { get } from "./api.js";
import { usePolled } from "./hooks.js";
import { useRef } from "./html.js";

const SECONDS = 2;
const MAX_SAMPLES = 300;

const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);

async function look(isAdmin, signal) {
  const [health, queue, models] = await Promise.all([
    get("health", {}, signal),
    get("v1/queue", {}, signal),
    isAdmin ? get("v1/admin/models", {}, signal) : null,
  ]);
  return { health, queues: queue.data, models: models?.data ?? null };
}

// {data: {health, queues, models, samples}, error, reload}; `models` has the workers, and is null without an admin key.
export function useLive(isAdmin) {
  const samples = useRef([]);
  const asked = async (signal) => {
    const state = await look(isAdmin, signal);
    const sample = {
      at: Date.now() / 1000,
      tokensPerSecond: sum(state.queues, (queue) => (queue.running ? queue.tokens_per_second : 0)),
      running: sum(state.queues, (queue) => queue.running),
      queued: sum(state.queues, (queue) => queue.queued),
    };
    samples.current = [...samples.current.slice(1 - MAX_SAMPLES), sample];
    return { ...state, samples: samples.current };
  };
  return usePolled(asked, SECONDS, [isAdmin]);
}

// Everything that needs attention, as {tone, text}, worst first. `queues` and `models` are the live state's.
export function findingsOf({ health, models }) {
  const found = [];
  const say = (tone, text) => found.push({ tone, text });
  if (health.database !== "ok") say("bad", "The database does not answer: nothing new is accepted until it does. Check PostgreSQL and CELERIAC_DATABASE_URL.");
  if (health.redis !== "ok") say("bad", "Redis does not answer: jobs run and nothing is lost, but streams are slower. Check Redis and CELERIAC_REDIS_URL.");
  if (health.maintenance.status === "silent") say("bad", "Maintenance is silent: jobs of dead workers are not rescued, batches and webhooks wait. Start celeriac maintenance.");
  if (health.database === "ok" && health.workers === 0) say("bad", "No worker is ready: jobs are accepted and wait. Start one with celeriac worker, or see what the models below wait for.");
  if (health.draining) say("wait", "This API process is stopping; requests go to others.");
  for (const finding of health.findings) {
    if (finding.waiting_for === "limit") continue; // in good order: batches wait for free slots
    const waited = `${finding.jobs === 1 ? "1 job" : `${finding.jobs} jobs`} of ${finding.model}`;
    say("bad", `${waited} waiting for ${Math.round(finding.seconds / 60)} min: ${finding.message}.`);
  }
  for (const model of health.models_unavailable) say("wait", `${model} cannot be served; its page under Models has the reason.`);
  for (const model of health.models_unloaded) say("calm", `${model} has been unloaded by an admin; its jobs wait until it is loaded.`);
  for (const [hostname] of Object.entries(health.workers_drained_since)) {
    const isLive = !models || models.some((model) => model.workers.some((worker) => worker.hostname === hostname));
    if (isLive) say("calm", `${hostname} is drained by an operator and takes no jobs until it is resumed.`);
  }
  return found;
}
