// The dashboard: who looks at it, the frame around the views, and which view the address asks for.

import { enterKey, get, isPossibleKey, may, onKeyChange, readKey, setScopes } from "./api.js";
import { link, useAddress } from "./hooks.js";
import { html, render, useEffect, useErrorBoundary, useRef, useState } from "./html.js";
import { useLive } from "./live.js";
import { Field, Loading, Problem, Status } from "./parts.js";
import { Access } from "./access.js";
import { Batches } from "./batches.js";
import { DeadLetters } from "./dead_letters.js";
import { JobPage } from "./job.js";
import { Jobs } from "./jobs.js";
import { Models } from "./models.js";
import { Overview } from "./overview.js";
import { Playground } from "./playground.js";
import { Usage } from "./usage.js";

const VIEWS = [
  { path: "", title: "Overview", view: Overview },
  { path: "jobs", title: "Jobs", view: Jobs },
  { path: "batches", title: "Batches", view: Batches },
  { path: "dead-letters", title: "Dead letters", view: DeadLetters },
  { path: "models", title: "Models", view: Models },
  { path: "playground", title: "Playground", view: Playground },
  { path: "usage", title: "Usage", view: Usage },
  { path: "access", title: "Access", view: Access, isForAdmins: true },
];

const AGAIN_SECONDS = 3;
const OWN_SCOPES = ["submit", "read", "cancel"];

// {isIn, isAway, isUnsure, scopes, error}: whether the API answers this page, with the key if it wants one. While the
// database does not answer, it cannot say what a key may do.
async function recognise() {
  try {
    return { isIn: true, scopes: (await get("v1/key")).scopes };
  } catch (error) {
    if (error.status === 401) return { isIn: false, error: readKey() ? error : null };
    if (!error.status) return { isIn: false, isAway: true, error };
    return { isIn: true, isUnsure: true, scopes: OWN_SCOPES };
  }
}

function useIdentity() {
  const [identity, setIdentity] = useState(null);
  useEffect(() => {
    let asking = null;
    let taken = null;
    let timer = 0;
    const ask = async () => {
      clearTimeout(timer);
      const own = (asking = {});
      const found = await recognise();
      if (own !== asking) return;
      asking = null;
      const isSure = !found.isAway && !found.isUnsure;
      if (isSure || !taken?.isIn) {
        taken = found;
        setScopes(found.scopes ?? []);
        setIdentity({ ...found, isAdmin: may("admin") });
      }
      if (!isSure) timer = setTimeout(askIfSeen, AGAIN_SECONDS * 1000);
    };
    const askIfSeen = () => (document.hidden ? (timer = setTimeout(askIfSeen, AGAIN_SECONDS * 1000)) : ask());
    ask();
    // A refusal of what `recognise` itself asks is its answer, and no reason to ask again.
    const stop = onKeyChange(({ isRefused }) => (isRefused && asking) || ask());
    return () => {
      asking = {};
      clearTimeout(timer);
      stop();
    };
  }, []);
  return identity;
}

function KeyForm({ error }) {
  const field = useRef(null);
  useEffect(() => field.current.focus(), []);
  const [mistake, setMistake] = useState(null);
  const onSubmit = (event) => {
    event.preventDefault();
    const key = field.current.value.trim();
    const isPossible = isPossibleKey(key);
    setMistake(isPossible ? null : new Error("This cannot be a key: it has spaces or characters beyond ASCII. Copy it again, as one line."));
    if (isPossible) enterKey(key);
  };
  const problem = mistake ?? error;
  return html`
    <main class="gate" id="main">
      <img src="static/celeriac.svg" alt="" width="48" height="48" />
      <h1>Celeriac</h1>
      <p class="soft">This server asks for an API key. It stays in this tab and is forgotten when you close it; you will see what the key may see.</p>
      <form onSubmit=${onSubmit}>
        <${Field} label="API key" hint="From your administrator, or made with: celeriac keys create. With --admin, it sees workers and all tenants, too">
          <input type="password" name="key" autocomplete="off" required ref=${field} />
        <//>
        <button class="primary">Enter</button>
      </form>
      ${problem && html`<${Problem} error=${problem} />`}
    </main>
  `;
}

const ForgetButton = () => html`<button type="button" class="quiet" onClick=${() => enterKey("")}>Forget key</button>`;

function ThemeButton() {
  const shown = () => document.documentElement.dataset.theme;
  const [theme, setTheme] = useState(shown());
  useEffect(() => {
    const prefersDark = matchMedia("(prefers-color-scheme: dark)"); // theme.js has heard of a change before
    const onChange = () => setTheme(shown());
    prefersDark.addEventListener("change", onChange);
    return () => prefersDark.removeEventListener("change", onChange);
  }, []);
  const other = theme === "dark" ? "light" : "dark";
  const turn = () => {
    document.documentElement.dataset.theme = other;
    try {
      localStorage.setItem("celeriac.theme", other);
    } catch {} // then for this page only
    setTheme(other);
  };
  return html`<button type="button" class="quiet" onClick=${turn}>${other === "dark" ? "Dark" : "Light"}</button>`;
}

function Frame({ chosen, identity, live, children }) {
  const health = live.data?.health;
  return html`
    <a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), document.getElementById("main").focus())}>Skip to the content</a>
    <header class="top">
      <a class="brand" href=${link("")}><img src="static/celeriac.svg" alt="" width="26" height="26" />Celeriac</a>
      <nav aria-label="Views">
        ${VIEWS.filter((view) => identity.isAdmin || !view.isForAdmins).map(({ path, title }) => html`<a key=${path} href=${link(path)} aria-current=${path === chosen.path ? "page" : undefined}>${title}</a>`)}
      </nav>
      <div class="end">
        <span role="status">${live.error ? html`<${Status} of="unhealthy">no answer<//>` : health && html`<${Status} of=${health.status} />`}</span>
        <a href="docs">API</a>
        <${ThemeButton} />
        ${readKey() && html`<${ForgetButton} />`}
      </div>
    </header>
    <main id="main" tabindex="-1">${children}</main>
  `;
}

// A view that cannot be drawn says so, and the others stay in reach.
function Contained({ children }) {
  const [error, drawAgain] = useErrorBoundary((raised) => console.error(raised));
  return error ? html`<${Problem} error=${{ message: `This page cannot be drawn: ${error.message}. It is a fault of the dashboard; celeriac and the API show the same.` }} onRetry=${drawAgain} />` : children;
}

function Dashboard({ identity }) {
  const address = useAddress();
  const live = useLive(identity.isAdmin);
  const [path = "", id] = address.path;
  const chosen = VIEWS.find((view) => view.path === path);
  const title = path === "jobs" && id ? "Job" : chosen?.title ?? "Not found";
  useEffect(() => {
    document.title = `${title} · Celeriac`;
    document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" }); // on a phone
    scrollTo(0, 0);
  }, [path, id]);
  let content = html`<h1>Not found</h1><p>There is no such view. <a href=${link("")}>Go to the overview</a>.</p>`;
  if (path === "jobs" && id) content = html`<${JobPage} key=${id} id=${id} />`;
  else if (chosen) content = html`<${chosen.view} key=${path} address=${address} live=${live} isAdmin=${identity.isAdmin} />`;
  return html`<${Frame} chosen=${chosen ?? {}} identity=${identity} live=${live}><${Contained} key=${`${path} ${id}`}>${content}<//><//>`;
}

function App() {
  const identity = useIdentity();
  if (!identity) return html`<main class="gate"><${Loading} /></main>`;
  if (identity.isAway) return html`<main class="gate"><h1>Celeriac</h1><${Problem} error=${identity.error} onRetry=${() => location.reload()} />${readKey() && html`<${ForgetButton} />`}</main>`;
  if (!identity.isIn) return html`<${KeyForm} error=${identity.error} />`;
  return html`<${Dashboard} key=${`${readKey()} ${identity.isAdmin}`} identity=${identity} />`;
}

render(html`<${App} />`, document.getElementById("app"));
