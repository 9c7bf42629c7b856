// A job's output as it is made: server-sent events over fetch, which unlike EventSource can send the key. A stream that
// breaks goes on after the last event that arrived; while the tab is hidden it is closed, as browsers open few
// connections to one server.

import { headersWithKey, refusalOf } from "./api.js";
import { useEffect, useState } from "./html.js";
import { parse } from "./json.js";

const ENDS = new Set(["job.completed", "job.failed", "job.cancelled", "job.expired"]);
const MAX_PAUSE_SECONDS = 15;

// Yields {event, id, data} for each event in the bytes of `body`.
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = {};
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (event.data !== undefined) yield { ...event, data: parse(event.data) };
          event = {};
        } else if (!line.startsWith(":")) {
          const [, name, text] = /^([^:]*):? ?(.*)$/.exec(line);
          event[name] = text;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const pause = (seconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

const untilVisible = (signal) =>
  new Promise((resolve) => {
    if (!document.hidden) return resolve();
    const stop = new AbortController();
    const look = () => (!document.hidden || signal.aborted) && (stop.abort(), resolve());
    document.addEventListener("visibilitychange", look, { signal: stop.signal });
    signal.addEventListener("abort", look, { signal: stop.signal });
  });

// Calls `onEvent({event, data})` for each event of the job until its end, and `onConnection` with "live" or "waiting".
// `beginning` is start or snapshot. Returns after the terminal event or when `signal` is aborted. Throws a Refusal.
export async function follow(jobId, { beginning, signal, onEvent, onConnection }) {
  let cursor = null;
  let pauseSeconds = 1;
  while (!signal.aborted) {
    await untilVisible(signal);
    const closing = new AbortController();
    const close = () => (document.hidden || signal.aborted) && closing.abort();
    document.addEventListener("visibilitychange", close);
    signal.addEventListener("abort", close);
    try {
      const headers = headersWithKey({ accept: "text/event-stream" });
      if (cursor !== null) headers["last-event-id"] = cursor;
      const url = new URL(`v1/jobs/${jobId}/events`, document.baseURI);
      url.searchParams.set("from", beginning);
      const response = await fetch(url, { headers, signal: closing.signal, cache: "no-store" });
      if (response.status === 204) return;
      if (!response.ok) throw await refusalOf(response);
      onConnection("live");
      pauseSeconds = 1;
      for await (const { event, id, data } of eventsOf(response.body)) {
        if (id !== undefined) cursor = id;
        if (event === "job.snapshot") cursor = String(data.sequence_number);
        onEvent({ event, data });
        if (ENDS.has(event)) return;
      }
    } catch (error) {
      if (error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
    } finally {
      document.removeEventListener("visibilitychange", close);
      signal.removeEventListener("abort", close);
    }
    if (signal.aborted) return;
    onConnection("waiting");
    if (!document.hidden) await pause(pauseSeconds, signal);
    pauseSeconds = Math.min(pauseSeconds * 2, MAX_PAUSE_SECONDS);
  }
}

const NOTHING = { texts: [], numTokens: 0, queue: null, started: false, job: null, connection: "waiting", error: null };

function after(state, { event, data }) {
  if (event === "output.delta") {
    const texts = [...state.texts];
    texts[data.index] = (texts[data.index] ?? "") + data.text;
    return { ...state, texts, started: true, numTokens: state.numTokens + data.num_tokens };
  }
  if (event === "job.snapshot") {
    const texts = [];
    for (const choice of data.choices) texts[choice.index] = choice.text;
    return { ...state, texts, numTokens: data.choices.reduce((sum, choice) => sum + choice.num_tokens, 0) };
  }
  if (event === "job.reset") return { ...state, texts: [], numTokens: 0 };
  if (event === "job.queued") return { ...state, queue: data };
  if (event === "job.started") return { ...state, started: true, queue: null };
  if (event === "job.retrying" || event === "job.paused") return { ...state, started: false };
  if (ENDS.has(event)) return { ...state, job: data, queue: null };
  return state;
}

// The state of a job's stream, drawn at most once a frame. `jobId` null: nothing is followed.
export function useStream(jobId, beginning = "snapshot") {
  const [state, setState] = useState(NOTHING);
  useEffect(() => {
    let current = NOTHING;
    let isDue = false;
    setState(NOTHING);
    if (!jobId) return undefined;
    const stop = new AbortController();
    const change = (next) => {
      current = next;
      if (isDue) return;
      isDue = true;
      const draw = () => ((isDue = false), stop.signal.aborted || setState(current));
      document.hidden ? setTimeout(draw) : requestAnimationFrame(draw);
    };
    follow(jobId, {
      beginning,
      signal: stop.signal,
      onEvent: (event) => change(after(current, event)),
      onConnection: (connection) => change({ ...current, connection }),
    }).catch((error) => change({ ...current, error }));
    return () => stop.abort();
  }, [jobId, beginning]);
  return state;
}
