// The state of the installation, asked for every two seconds while the tab is visible, and its last ten minutes, which
// exist in this page only. All views read it from here, so there is one poll however many show it.

import { get } from "./api.js";
import { usePolled } from "./hooks.js";
import { useRef } from "./html.js";

const SECONDS = 2;
const MAX_SAMPLES = 300;

const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);

// Without a database, or with one that is too slow, only /health answers and says so: `isBlind`, and nothing else is
// known.
async function look(isAdmin, signal) {
  const asked = [get("health", {}, signal), get("v1/queue", {}, signal), isAdmin ? get("v1/admin/models", {}, signal) : null];
  const [health, queue, models] = await Promise.allSettled(asked);
  const isAway = [queue, models].some((answer) => answer.reason?.status === 503);
  if (health.value && (health.value.database !== "ok" || isAway)) return { health: health.value, queues: [], models: isAdmin ? [] : null, isBlind: true };
  for (const answer of [health, queue, models]) if (answer.status === "rejected") throw answer.reason;
  return { health: health.value, queues: queue.value.data, models: models.value?.data ?? null, isBlind: false };
}

// {data: {health, queues, models, isBlind, samples}, error, reload}; `models` has the workers, and is null without an
// admin key.
export function useLive(isAdmin) {
  const samples = useRef([]);
  const asked = async (signal) => {
    const state = await look(isAdmin, signal);
    if (state.isBlind) return { ...state, samples: samples.current };
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

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

// Everything that needs attention, as {tone, text}, worst first: what /health finds wrong, in its words, and then what
// operators have ordered.
export function findingsOf({ health, models }) {
  const found = health.reasons.map((reason) => ({ tone: "bad", text: sentence(reason) }));
  const say = (text) => found.push({ tone: "calm", text });
  for (const model of health.models_unloaded) say(`${model} has been unloaded by an admin; its jobs wait until it is loaded.`);
  for (const [hostname] of Object.entries(health.workers_drained_since)) {
    const isLive = !models || models.some((model) => model.workers.some((worker) => worker.hostname === hostname));
    if (isLive) say(`${hostname} is drained by an operator and takes no jobs until it is resumed.`);
  }
  return found;
}
