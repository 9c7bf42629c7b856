// The list of jobs: filtered by the address, so that a search can be linked to, with actions on many at once.

import { forEach, get, may, post } from "./api.js";
import { duration, ending, jobIdOf, plural, secondsBetween, secondsSince, shortened } from "./format.js";
import { link, useClock, usePolled, visit } from "./hooks.js";
import { html, useEffect, useState } from "./html.js";
import { Card, Chip, Confirmed, Empty, Field, JobLink, Polled, Problem, Scrolled, Status, Time } from "./parts.js";
import { useStream } from "./stream.js";

const STATUSES = ["queued", "in_progress", "completed", "failed", "cancelled", "expired"];
const ACTIONS = [["cancel", "cancel"], ["submit", "retry"]]; // [scope, what it allows here]
const RETRYABLE = new Set(["failed", "expired", "cancelled"]);
const PAGE = 25;
const NUM_STREAMED = 3; // a browser opens six connections to a server at most
const TAIL = 160; // characters of a running job's text that the list shows

export const isOver = (job) => job.finished_at !== null;

// What the search box asks for: `batch_…`, `name=value` of the metadata, or else an idempotency key.
function filtersOf(query) {
  const text = query.get("q")?.trim() ?? "";
  const filters = { status: query.get("status"), model: query.get("model"), after: query.get("after"), limit: PAGE };
  const at = text.indexOf("=");
  if (text.startsWith("batch_")) filters.batch = text;
  else if (at > 0) filters[`metadata[${text.slice(0, at)}]`] = text.slice(at + 1);
  else if (text) filters.idempotency_key = text;
  return filters;
}

function Filters({ query, models }) {
  const [text, setText] = useState(query.get("q") ?? "");
  useEffect(() => setText(query.get("q") ?? ""), [query]);
  const change = (changed) => visit("jobs", { q: text.trim(), status: query.get("status"), model: query.get("model"), ...changed });
  const onSubmit = (event) => {
    event.preventDefault();
    const id = jobIdOf(text);
    if (id && !text.trim().startsWith("batch_")) visit(`jobs/${id}`);
    else change({});
  };
  return html`
    <form class="filters" role="search" onSubmit=${onSubmit}>
      <${Field} label="Search" hint="An id, an idempotency key, or name=value of the metadata">
        <input type="search" value=${text} maxlength="600" spellcheck="false" onInput=${({ target }) => setText(target.value)} onSearch=${({ target }) => target.value === "" && change({ q: "" })} />
      <//>
      <${Field} label="Status">
        <select value=${query.get("status") ?? ""} onChange=${({ target }) => change({ status: target.value })}>
          <option value="">any</option>
          ${STATUSES.map((status) => html`<option key=${status} value=${status}>${status.replace("_", " ")}</option>`)}
        </select>
      <//>
      <${Field} label="Model">
        <select value=${query.get("model") ?? ""} onChange=${({ target }) => change({ model: target.value })}>
          <option value="">any</option>
          ${models.map((model) => html`<option key=${model} value=${model}>${model}</option>`)}
        </select>
      <//>
      <button>Search</button>
    </form>
  `;
}

function RunningText({ id }) {
  const stream = useStream(id);
  const text = stream.texts[0] ?? "";
  return html`<p class="tail" aria-hidden="true">${text.length > TAIL ? `…${ending(text, TAIL)}` : text}<span class="caret"></span></p>`;
}

function took(job) {
  if (isOver(job)) return duration(secondsBetween(job.created_at, job.finished_at));
  return duration(secondsSince(job.started_at ?? job.created_at));
}

const Row = ({ job, isChosen, onChoose, isStreamed }) => html`
  <tr data-chosen=${isChosen}>
    ${onChoose && html`<td><input type="checkbox" checked=${isChosen} aria-label=${`Select ${job.id}`} onChange=${() => onChoose(job.id)} /></td>`}
    <td><${JobLink} id=${job.id} />${isStreamed && html`<${RunningText} id=${job.id} />`}${job.error && html`<p class="tail">${job.error.message}</p>`}</td>
    <td><${Status} of=${job.status}>${job.cancel_requested && !isOver(job) ? "cancelling" : undefined}<//></td>
    <td>${job.model}</td>
    <td><${Time} at=${job.created_at} /></td>
    <td class="number">${took(job)}</td>
    <td class="number">${job.usage ? job.usage.completion_tokens : "–"}</td>
    <td>${Object.entries(job.metadata).slice(0, 3).map(([name, value]) => html`<a key=${name} class="plain" href=${link("jobs", { q: `${name}=${value}` })} title=${`Jobs with ${name}=${value}`}><${Chip}>${shortened(`${name}=${value}`)}<//></a>`)}</td>
  </tr>
`;

function Actions({ jobs, chosen, onDone }) {
  const [refusals, setRefusals] = useState([]);
  const selected = jobs.filter((job) => chosen.has(job.id));
  const cancellable = selected.filter((job) => !isOver(job));
  const retryable = selected.filter((job) => RETRYABLE.has(job.status));
  const act = (what, on) => async () => {
    setRefusals(await forEach(on, what));
    onDone();
  };
  const cancel = act((job) => post(`v1/jobs/${job.id}/cancel`), cancellable);
  const retry = act((job) => post(`v1/jobs/${job.id}/retry`), retryable);
  return html`
    <div class="bulk" role="group" aria-label="Actions on the selected jobs">
      <span class="soft" role="status">${selected.length ? `${selected.length} selected` : `Select jobs to ${ACTIONS.filter(([scope]) => may(scope)).map(([, act]) => act).join(" or ")} them`}</span>
      ${may("cancel") && html`<${Confirmed} label=${`Cancel ${cancellable.length || ""}`} question=${`Cancel ${plural(cancellable.length, "job")}?`} disabled=${!cancellable.length} onConfirm=${cancel} />`}
      ${may("submit") && html`<${Confirmed} label=${`Retry ${retryable.length || ""}`} question=${`Retry ${plural(retryable.length, "job")}?`} disabled=${!retryable.length} onConfirm=${retry} />`}
    </div>
    ${refusals.map(({ item, error }) => html`<${Problem} key=${item.id} error=${{ message: `${item.id}: ${error.message}` }} />`)}
  `;
}

function JobTable({ jobs, hasMore, query, reload }) {
  const [chosen, setChosen] = useState(new Set());
  useClock();
  const toggle = (id) => setChosen((ids) => new Set(ids.has(id) ? [...ids].filter((one) => one !== id) : [...ids, id]));
  const areAllChosen = jobs.length > 0 && jobs.every((job) => chosen.has(job.id));
  const streamed = new Set(jobs.filter((job) => job.status === "in_progress" && job.kind === "generation").slice(0, NUM_STREAMED).map((job) => job.id));
  const page = (after) => link("jobs", { q: query.get("q"), status: query.get("status"), model: query.get("model"), after });
  if (!jobs.length) {
    const isFiltered = ["q", "status", "model", "after"].some((name) => query.get(name));
    return isFiltered ? html`<${Empty} title="No job matches">Look for fewer things at once, or <a href=${link("jobs")}>show all jobs</a>.<//>` : html`<${Empty} title="No jobs yet">The <a href=${link("playground")}>playground</a> makes one, and each job's page shows the code for more.<//>`;
  }
  const done = () => (setChosen(new Set()), reload());
  const canAct = ACTIONS.some(([scope]) => may(scope));
  return html`
    ${canAct && html`<${Actions} jobs=${jobs} chosen=${chosen} onDone=${done} />`}
    <${Scrolled} label="Jobs"><table>
      <thead><tr>
        ${canAct && html`<th><input type="checkbox" checked=${areAllChosen} aria-label="Select all jobs of this page" onChange=${() => setChosen(new Set(areAllChosen ? [] : jobs.map((job) => job.id)))} /></th>`}
        <th>Job</th><th>Status</th><th>Model</th><th>Accepted</th><th class="number">Took</th><th class="number">Tokens</th><th>Metadata</th>
      </tr></thead>
      <tbody>${jobs.map((job) => html`<${Row} key=${job.id} job=${job} isChosen=${chosen.has(job.id)} onChoose=${canAct && toggle} isStreamed=${streamed.has(job.id)} />`)}</tbody>
    </table><//>
    <nav class="pages" aria-label="Pages">
      ${query.get("after") && html`<a href=${page("")}>Newest</a>`}
      ${hasMore && html`<a href=${page(jobs[jobs.length - 1].id)}>Older</a>`}
    </nav>
  `;
}

export function Jobs({ address, live }) {
  const { query } = address;
  const asked = query.toString();
  const isNewestPage = !query.get("after");
  const state = usePolled((signal) => get("v1/jobs", filtersOf(query), signal), isNewestPage ? 3 : 0, [asked]);
  const models = live.data?.health.models ?? [];
  return html`
    <h1>Jobs</h1>
    <${Filters} query=${query} models=${models} />
    <${Card}><${Polled} state=${state}>${({ data, has_more }) => html`<${JobTable} key=${asked} jobs=${data} hasMore=${has_more} query=${query} reload=${state.reload} />`}<//><//>
  `;
}
