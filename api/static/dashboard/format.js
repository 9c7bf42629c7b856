// Numbers, times and names as people read them.

const counts = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const moments = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

export const count = (number) => (number === null || number === undefined ? "–" : counts.format(number));
export const compact = (number) => (number === null || number === undefined ? "–" : Math.abs(number) < 10_000 ? counts.format(number) : short.format(number));
export const percent = (share) => (share === null || share === undefined ? "–" : `${Math.round(share * 100)} %`);
export const rate = (perSecond) => (!perSecond ? "0" : perSecond < 10 ? perSecond.toFixed(1) : counts.format(perSecond));

export function bytes(number) {
  if (number === null || number === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, number)) / 10));
  const value = number / 1024 ** power;
  return `${value.toFixed(value < 10 && power > 0 ? 1 : 0)} ${units[power]}`;
}

const inTwo = (large, one, small, other) => (small ? `${large} ${one} ${small} ${other}` : `${large} ${one}`);

export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds < 0.0005) return "0 s";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return inTwo(Math.floor(seconds / 60), "min", Math.floor(seconds % 60), "s");
  if (seconds < 86_400) return inTwo(Math.floor(seconds / 3600), "h", Math.floor((seconds % 3600) / 60), "min");
  return inTwo(Math.floor(seconds / 86_400), "d", Math.floor((seconds % 86_400) / 3600), "h");
}

// Timestamps of the API are ISO 8601 text, or seconds since 1970 on OpenAI's routes.
export const toDate = (timestamp) => new Date(typeof timestamp === "number" ? timestamp * 1000 : timestamp);
export const secondsBetween = (from, to) => (toDate(to) - toDate(from)) / 1000;
export const secondsSince = (timestamp) => Math.max(0, (Date.now() - toDate(timestamp)) / 1000);
export const moment = (timestamp) => moments.format(toDate(timestamp));
export const clockTime = (timestamp) => clock.format(toDate(timestamp));

export function ago(timestamp) {
  const seconds = secondsSince(timestamp);
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

// The last characters of an id tell jobs of one moment apart; the first ones are the same for all of them.
export const shortId = (id) => (id.length > 18 ? `${id.slice(0, id.indexOf("_") + 1)}…${id.slice(-6)}` : id);

// What one or many queued jobs wait for, by the API's name for it.
export const WAITING = {
  slots: "a free slot",
  turn: "the tenant's next turn, paused for others",
  worker: "a worker of the model",
  model_load: "the model to load",
  revision: "a worker with the revision of the model that the text began with",
  isolation: "a moment to run alone",
  limit: "room within a limit: batches have used their share, or an attempt failed just now",
  same_request: "the answer to the same request, which came earlier",
  pause: "the model, which is unloaded or draining",
};

// Where a queued job stands, from the stream's or the job's `queue`: "for a free slot, behind 3 jobs; …".
export function waitingInWords(place) {
  const reason = WAITING[place?.waiting_for] ?? "a worker";
  const others = place?.position ? `, behind ${plural(place.position, "job")}` : "";
  return `for ${reason}${others}${place?.eta_seconds ? `; starts in about ${duration(place.eta_seconds)}` : ""}`;
}

export const WAITING_SHORT = {
  slots: "for a slot",
  turn: "for a turn",
  worker: "no worker",
  model_load: "model loads",
  revision: "revision gone",
  isolation: "to run alone",
  limit: "limit",
  same_request: "for the same request",
  pause: "paused",
};

// The id of the job behind any id of the API: `chatcmpl-01J…` and `resp_01J…` have the same 26 characters after it.
export function jobIdOf(text) {
  const match = /(?:^|[_-])([0-9A-HJKMNP-TV-Z]{26})$/i.exec(text.trim());
  return match ? `job_${match[1].toUpperCase()}` : null;
}

// The first or last characters of a text, at most `length`. An emoji is two of them, and is not cut in halves.
export const beginning = (text, length) => text.slice(0, length).replace(/[\ud800-\udbff]$/, "");
export const ending = (text, length) => text.slice(-length).replace(/^[\udc00-\udfff]/, "");

// So that one long value does not push all else out of a table.
export const shortened = (text, length = 40) => (text.length > length ? `${beginning(text, length - 1)}…` : text);
