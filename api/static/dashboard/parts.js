// The small parts that all views are made of.

import { ago, beginning, count, ending, moment, shortId } from "./format.js";
import { link } from "./hooks.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "./html.js";

const STATUS_TONES = {
  queued: "wait",
  in_progress: "run",
  running: "run",
  completed: "good",
  failed: "bad",
  cancelled: "calm",
  expired: "calm",
  ready: "good",
  loaded: "good",
  loading: "run",
  draining: "wait",
  standby: "calm",
  unloaded: "calm",
  waiting: "wait",
  validating: "wait",
  finalizing: "run",
  cancelling: "wait",
  ok: "good",
  degraded: "wait",
  unhealthy: "bad",
};

export const Status = ({ of, children }) => html`<span class="status" data-tone=${STATUS_TONES[of] ?? "calm"}>${children ?? of.replace("_", " ")}</span>`;

export const Chip = ({ tone = "calm", title, children }) => html`<span class="chip" data-tone=${tone} title=${title}>${children}</span>`;

export const Time = ({ at }) => (at ? html`<time datetime=${typeof at === "string" ? at : undefined} title=${moment(at)}>${ago(at)}</time>` : html`<span class="soft">–</span>`);

export const JobLink = ({ id }) => html`<a class="id" href=${link(`jobs/${id}`)} title=${id}>${shortId(id)}</a>`;

export function Copy({ text, label = "Copy" }) {
  const [said, setSaid] = useState("");
  useEffect(() => {
    if (!said) return undefined;
    const timer = setTimeout(() => setSaid(""), 2000);
    return () => clearTimeout(timer);
  }, [said]);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setSaid("Copied");
    } catch {
      setSaid("Select it and copy it by hand: this browser allows no more over plain HTTP");
    }
  };
  return html`<button type="button" class="quiet" onClick=${copy} aria-live="polite">${said || label}</button>`;
}

export const Card = ({ title, actions, children, class: name = "" }) => html`
  <section class="card ${name}">
    ${(title || actions) && html`<header>${title && html`<h2>${title}</h2>`}<div class="actions">${actions}</div></header>`}
    ${children}
  </section>
`;

export const Empty = ({ title, children }) => html`<div class="empty"><strong>${title}</strong>${children && html`<p>${children}</p>`}</div>`;

export const Loading = () => html`<div class="empty soft" role="status">Loading…</div>`;

// An error in the API's own words, which say what to do. `onRetry` is optional.
export const Problem = ({ error, onRetry }) => html`
  <div class="problem" role="alert">
    <p>${error.param && !error.message.startsWith(error.param) && html`<code>${error.param}</code>${": "}`}${error.message}</p>
    ${onRetry && html`<button type="button" onClick=${onRetry}>Try again</button>`}
  </div>
`;

// The first of many rows, and all of them when asked for. `children` draws the rows that it is given.
export function Shortened({ rows, first, name, children }) {
  const [isWhole, showWhole] = useState(false);
  const shown = isWhole ? rows : rows.slice(0, first);
  return html`${children(shown)}${shown.length < rows.length && html`<p class="more"><button type="button" onClick=${() => showWhole(true)}>Show all ${count(rows.length)} ${name}</button></p>`}`;
}

// What `usePolled` gives, drawn: the first answer is awaited, and a later error is shown above what is known.
export function Polled({ state, children }) {
  if (!state.data && !state.error) return html`<${Loading} />`;
  return html`${state.error && html`<${Problem} error=${state.error} onRetry=${state.reload} />`}${state.data && children(state.data)}`;
}

// So that a row can be a list on a phone: each cell is told what it is by its column's name.
function nameCells(box) {
  const names = [...box.querySelectorAll("thead th")].map((cell) => cell.textContent);
  for (const row of box.querySelectorAll("tbody tr")) [...row.cells].forEach((cell, place) => (cell.dataset.label = names[place] ?? ""));
}

// A wide table: where it does not fit, the keyboard can scroll it, too.
export function Scrolled({ label, children }) {
  const box = useRef(null);
  const [isWide, setWide] = useState(false);
  const look = () => box.current && setWide(box.current.scrollWidth > box.current.clientWidth); // none once it is removed
  useLayoutEffect(() => (nameCells(box.current), look()));
  useEffect(() => {
    const observer = new ResizeObserver(look);
    observer.observe(box.current);
    return () => observer.disconnect();
  }, []);
  return html`<div class="scroll" ref=${box} ...${isWide ? { tabindex: 0, role: "region", "aria-label": label } : {}}>${children}</div>`;
}

// How much of something is taken. `label` says it to those who do not see the bar.
export function Meter({ value, max, label, tone = "run" }) {
  const share = max > 0 ? Math.min(1, value / max) : 0;
  return html`<div class="meter" data-tone=${tone} role="meter" aria-label=${label} aria-valuemin="0" aria-valuemax=${max} aria-valuenow=${Math.min(value, max)}>
    <div style=${{ width: `${share * 100}%` }}></div>
  </div>`;
}

export function Field({ label, hint, error, children }) {
  return html`<label class="field ${error ? "wrong" : ""}"><span>${label}</span>${children}${error ? html`<small role="alert">${error}</small>` : hint && html`<small>${hint}</small>`}</label>`;
}

const MAX_SHOWN = 20_000; // characters: a browser takes seconds to lay out megabytes

// The beginning of a text, and all of it when asked for.
export function LongText({ text }) {
  const [isWhole, showWhole] = useState(false);
  if (isWhole || !text || text.length <= MAX_SHOWN) return text;
  return html`${beginning(text, MAX_SHOWN)}… <button type="button" onClick=${() => showWhole(true)}>Show all ${count(text.length)} characters</button>`;
}

export const Code = ({ text, label }) => html`<div class="code"><pre tabindex="0" role="region" aria-label=${label}>${text.length > MAX_SHOWN ? `${beginning(text, MAX_SHOWN)}…\n\n${count(text.length - MAX_SHOWN)} more characters, which Copy copies, too` : text}</pre><${Copy} text=${text} /></div>`;

// Tabs as in the ARIA authoring practices: arrow keys move, only the chosen tab is in the tab order.
export function Tabs({ label, tabs }) {
  const [chosen, choose] = useState(0);
  const list = useRef(null);
  const onKeyDown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = (chosen + step + tabs.length) % tabs.length;
    choose(next);
    list.current.children[next].focus();
  };
  return html`
    <div class="tabs" role="tablist" aria-label=${label} ref=${list} onKeyDown=${onKeyDown}>
      ${tabs.map(([name], index) => html`<button type="button" role="tab" key=${name} aria-selected=${index === chosen ? "true" : "false"} tabindex=${index === chosen ? 0 : -1} onClick=${() => choose(index)}>${name}</button>`)}
    </div>
    <div role="tabpanel" aria-label=${tabs[chosen][0]}>${tabs[chosen][1]}</div>
  `;
}

// Text of a model: a text node, whatever it contains. While it grows, its end stays in view unless the reader scrolls,
// and only its end is drawn: laying out a hundred thousand tokens with each new one would take all of the browser's time.
export function Output({ text, isLive, label = "Output", placeholder = "No output yet" }) {
  const box = useRef(null);
  const atEnd = useRef(true);
  const [isWhole, showWhole] = useState(false);
  const shown = isLive && !isWhole && text ? ending(text, MAX_SHOWN) : text;
  const onScroll = ({ target }) => (atEnd.current = target.scrollHeight - target.scrollTop - target.clientHeight < 24);
  useLayoutEffect(() => {
    if (isLive && atEnd.current && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [text, isLive]);
  return html`<div class="output" ref=${box} onScroll=${onScroll} tabindex="0" role="log" aria-live="polite" aria-busy=${isLive ? "true" : "false"} aria-label=${label}>
    ${text && shown.length < text.length && html`<p><button type="button" onClick=${() => showWhole(true)}>Show the ${count(text.length - shown.length)} characters before</button></p>`}
    ${text ? html`<span>${shown}</span>${isLive && html`<span class="caret" aria-hidden="true"></span>`}` : html`<span class="soft">${placeholder}</span>`}
  </div>`;
}

// A button that asks once more before it does something that cannot be undone. The focus goes to the way out, and back.
export function Confirmed({ label, question, onConfirm, disabled }) {
  const [isAsking, ask] = useState(false);
  const [isBusy, setBusy] = useState(false);
  const asker = useRef(null);
  const keeper = useRef(null);
  const wasAsking = useRef(false);
  useLayoutEffect(() => {
    if (isAsking) keeper.current.focus();
    else if (wasAsking.current) asker.current.focus();
    wasAsking.current = isAsking;
  }, [isAsking]);
  const confirm = async () => {
    setBusy(true);
    try {
      await onConfirm();
    } finally {
      setBusy(false);
      ask(false);
    }
  };
  if (!isAsking) return html`<button type="button" ref=${asker} disabled=${disabled} onClick=${() => ask(true)}>${label}</button>`;
  return html`<span class="asked" role="group" aria-label=${question} onKeyDown=${({ key }) => key === "Escape" && !isBusy && ask(false)}><span>${question}</span>
    <button type="button" class="danger" disabled=${isBusy || disabled} onClick=${confirm}>${label}</button>
    <button type="button" class="quiet" ref=${keeper} disabled=${isBusy} onClick=${() => ask(false)}>Keep</button></span>`;
}

// Runs an action of a button and shows its refusal. Returns [act, error, isBusy].
export function useAction() {
  const [error, setError] = useState(null);
  const [isBusy, setBusy] = useState(false);
  const act = async (what) => {
    setBusy(true);
    setError(null);
    try {
      return await what();
    } catch (refusal) {
      setError(refusal);
      return undefined;
    } finally {
      setBusy(false);
    }
  };
  return [act, error, isBusy];
}
