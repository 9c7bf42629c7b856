// Requests to the API, all through its public routes, with the key that the user has entered. The key is kept for this
// tab only, and is never part of a URL.

import { parse } from "./json.js";
import { keep, kept } from "./kept.js";

const KEY = "celeriac.key";
const listeners = new Set();

// A header can carry no other characters; a copied key may have typographic ones or a line break within it.
export const isPossibleKey = (key) => /^[\x21-\x7e]+$/.test(key);

// What the key may do, by the API's scopes: what it would be refused is not offered.
let scopes = new Set();
export const may = (scope) => scopes.has(scope);
export const setScopes = (held) => {
  scopes = new Set(held);
};

export const readKey = () => kept(KEY) ?? "";

export function enterKey(key) {
  keep(KEY, key || null);
  for (const listener of listeners) listener({ isRefused: false });
}

// Calls `listener({isRefused})` whenever the key changes or is refused. Returns a function that stops that.
export function onKeyChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

// What the API refused, in its own words, which name the remedy; or that it did not answer (status 0).
export class Refusal extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.param = error.param;
  }
}

const UNREACHABLE = { message: "The server does not answer. Check that it runs; the page asks again by itself.", code: "unreachable" };

export function headersWithKey(headers = {}) {
  const key = readKey();
  return key ? { ...headers, authorization: `Bearer ${key}` } : headers;
}

export async function send(method, path, { query, body, headers, signal } = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, value);
  }
  const options = { method, signal, headers: headersWithKey(headers), cache: "no-store" };
  if (body instanceof FormData) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { ...options.headers, "content-type": "application/json" };
  }
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, UNREACHABLE);
  }
  if (!response.ok && !(path === "health" && response.status === 503)) throw await refusalOf(response);
  return response;
}

export async function refusalOf(response) {
  if (response.status === 401) listeners.forEach((listener) => listener({ isRefused: true }));
  const said = await response.json().catch(() => null);
  return new Refusal(response.status, said?.error ?? { message: `The server answered ${response.status} without a reason. Try again; if it stays, look at the log of the API.` });
}

const NOT_OURS = { message: "What answered is not the API of Celeriac, but perhaps a proxy that wants you to log in. Reload the page.", code: "unexpected_answer" };

async function read(response) {
  const text = await response.text();
  try {
    return parse(text);
  } catch {
    throw new Refusal(response.status, NOT_OURS);
  }
}

export const get = async (path, query, signal) => read(await send("GET", path, { query, signal }));
export const post = async (path, body) => read(await send("POST", path, { body }));
export const remove = async (path) => read(await send("DELETE", path));

// Does `act` to all items, four at a time, and returns the refusals; one refusal does not keep the others from it.
export async function forEach(items, act) {
  const waiting = [...items];
  const refusals = [];
  const work = async () => {
    while (waiting.length) {
      const item = waiting.shift();
      try {
        await act(item);
      } catch (error) {
        refusals.push({ item, error });
      }
    }
  };
  await Promise.all([work(), work(), work(), work()]);
  return refusals;
}
