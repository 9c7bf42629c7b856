// What views share: asking again and again while somebody looks, the address, and the clock.

import { useCallback, useEffect, useRef, useState } from "./html.js";
import { keep, kept } from "./kept.js";

const MAX_PAUSE_SECONDS = 10; // after failures: whoever looks wants to see that it is back

// Calls `ask(signal)` at once and then `seconds` after each answer, while the tab is visible. `inputs` start it anew.
// `seconds` may be a function of the data; 0: it is not asked for again.
// Returns {data, error, reload}; data stays when an answer fails, so that a page does not lose what it shows.
export function usePolled(ask, seconds, inputs) {
  const [state, setState] = useState({ data: null, error: null });
  const again = useRef(() => {});
  useEffect(() => {
    let timer = 0;
    let failures = 0;
    let asking = null;
    let pause = typeof seconds === "function" ? MAX_PAUSE_SECONDS : seconds;
    setState({ data: null, error: null });
    const run = async () => {
      clearTimeout(timer);
      asking?.abort();
      const own = (asking = new AbortController());
      try {
        const data = await ask(own.signal);
        if (own.signal.aborted) return;
        failures = 0;
        if (typeof seconds === "function") pause = seconds(data);
        setState({ data, error: null });
      } catch (error) {
        if (own.signal.aborted) return;
        failures += 1;
        setState((earlier) => ({ ...earlier, error }));
      }
      const wait = failures ? Math.min(Math.max(pause, MAX_PAUSE_SECONDS), pause * 2 ** failures) : pause;
      if (pause && !document.hidden) timer = setTimeout(run, wait * 1000);
    };
    const onVisible = () => (document.hidden ? clearTimeout(timer) : run());
    again.current = run;
    document.addEventListener("visibilitychange", onVisible);
    addEventListener("online", onVisible);
    run();
    return () => {
      document.removeEventListener("visibilitychange", onVisible);
      removeEventListener("online", onVisible);
      clearTimeout(timer);
      asking?.abort();
    };
  }, inputs);
  return { ...state, reload: useCallback(() => again.current(), []) };
}

// Draws again every `seconds`, for texts such as "5 s ago".
export function useClock(seconds = 1) {
  const [, draw] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => !document.hidden && draw((drawn) => drawn + 1), seconds * 1000);
    return () => clearInterval(timer);
  }, [seconds]);
}

// A part of the address that is not well encoded stays as it is, and names nothing.
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

// The address after #, as a path and a query: `#/jobs?status=failed`.
export function addressOf(hash = location.hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  return { path: path.split("/").filter(Boolean).map(decoded), query: new URLSearchParams(query) };
}

export function useAddress() {
  const [address, setAddress] = useState(addressOf());
  useEffect(() => {
    const onChange = () => setAddress(addressOf());
    addEventListener("hashchange", onChange);
    return () => removeEventListener("hashchange", onChange);
  }, []);
  return address;
}

export function link(path, query = {}) {
  const parameters = new URLSearchParams(Object.entries(query).filter(([, value]) => value));
  const text = parameters.toString();
  return `#/${path}${text ? `?${text}` : ""}`;
}

export const visit = (path, query) => {
  location.hash = link(path, query);
};

// State that survives a reload of this tab.
export function useKept(name, initial) {
  const [value, setValue] = useState(() => {
    try {
      return JSON.parse(kept(name)) ?? initial;
    } catch {
      return initial;
    }
  });
  useEffect(() => keep(name, JSON.stringify(value)), [value]);
  return [value, setValue];
}
