// What the installation does now: what waits and why, who works, and what needs attention.

import { get } from "./api.js";
import { Chart } from "./chart.js";
import { WAITING, WAITING_SHORT, bytes, compact, count, duration, percent, plural, rate } from "./format.js";
import { link, usePolled } from "./hooks.js";
import { html } from "./html.js";
import { findingsOf } from "./live.js";
import { Card, Chip, Empty, JobLink, Meter, Output, Polled, Scrolled, Shortened, Status, Time } from "./parts.js";
import { useStream } from "./stream.js";

const NUM_SHOWN = 20; // queues and workers
const NUM_FINDINGS = 8;
const NUM_SHOWN_RUNNING = 3; // each takes one of the six connections that a browser opens to a server

const Tile = ({ name, value, note }) => html`<div class="tile"><dt>${name}</dt><dd>${value}</dd><dd class="soft">${note}</dd></div>`;

function Tiles({ health, queues }) {
  const slots = queues.reduce((sum, queue) => sum + queue.slots, 0);
  const running = queues.reduce((sum, queue) => sum + queue.running, 0);
  const queued = queues.reduce((sum, queue) => sum + queue.queued, 0);
  const oldest = Math.max(0, ...queues.map((queue) => queue.oldest_queued_seconds));
  const tokens = queues.reduce((sum, queue) => sum + (queue.running ? queue.tokens_per_second : 0), 0);
  const recent = health.metrics;
  const isBusy = recent && recent.requests.total > 0;
  return html`
    <dl class="tiles">
      <${Tile} name="Running" value=${count(running)} note=${slots ? `of ${plural(slots, "slot")}` : "no worker is ready"} />
      <${Tile} name="Queued" value=${compact(queued)} note=${queued ? `oldest ${duration(oldest)}` : "nothing waits"} />
      <${Tile} name="Tokens per second" value=${rate(tokens)} note=${plural(health.workers, "worker")} />
      <${Tile} name="First token" value=${isBusy ? duration(recent.ttft.p50) : "–"} note=${isBusy ? `95 %: ${duration(recent.ttft.p95)}` : "no recent jobs"} />
      <${Tile} name="Succeeded" value=${isBusy ? percent(recent.requests.success_rate) : "–"} note=${isBusy ? `${plural(recent.requests.total, "job")} in ${duration(recent.window_seconds)}` : "no recent jobs"} />
    </dl>
  `;
}

function Findings({ state }) {
  const found = findingsOf(state);
  if (!found.length) return html`<p class="fine"><${Status} of="ok">All is well<//> <span class="soft">Database, Redis, maintenance and workers answer, and nothing is stuck.</span></p>`;
  return html`<${Card} title="Needs attention"><${Shortened} rows=${found} first=${NUM_FINDINGS} name="findings">${(shown) => html`<ul class="findings">${shown.map(({ tone, text }) => html`<li key=${text} data-tone=${tone}>${text}</li>`)}</ul>`}<//><//>`;
}

const WaitingFor = ({ reasons }) => {
  const entries = Object.entries(reasons);
  if (!entries.length) return html`<span class="soft">–</span>`;
  return entries.map(([reason, number]) => html`<${Chip} key=${reason} tone=${reason === "slots" ? "calm" : "wait"} title=${`${plural(number, "job")} waiting for ${WAITING[reason] ?? reason}`}>${compact(number)} ${WAITING_SHORT[reason] ?? reason}<//>`);
};

const Eta = ({ seconds }) => (seconds === null ? "–" : seconds === 0 ? "at once" : duration(seconds));

function Queues({ queues }) {
  const busiestFirst = [...queues].sort((one, other) => other.queued + other.running - (one.queued + one.running) || other.workers - one.workers);
  return html`
    <${Card} title="Queues">
      <${Shortened} rows=${busiestFirst} first=${NUM_SHOWN} name="queues">${(shown) => html`<${Scrolled} label="Queues"><table>
        <thead><tr><th>Model</th><th>State</th><th class="wide">Slots</th><th class="number">Queued</th><th class="number">Oldest</th><th class="number">A new job starts in</th><th class="number">Tokens/s</th><th>Waiting for</th></tr></thead>
        <tbody>${shown.map((queue) => html`
          <tr key=${queue.model}>
            <td><a href=${link("jobs", { model: queue.model })}>${queue.model}</a></td>
            <td>${queue.load_percent !== null ? html`<${Status} of="loading">loading ${queue.load_percent} %<//>` : html`<${Status} of=${queue.workers ? "ready" : "standby"}>${queue.workers ? "ready" : "not loaded"}<//>`}</td>
            <td><div class="slots"><${Meter} value=${queue.running} max=${queue.slots} label=${`${queue.running} of ${queue.slots} slots of ${queue.model} are taken`} /><span>${queue.running} / ${queue.slots}</span></div></td>
            <td class="number">${compact(queue.queued)}</td>
            <td class="number">${queue.queued ? duration(queue.oldest_queued_seconds) : "–"}</td>
            <td class="number"><${Eta} seconds=${queue.eta_seconds} /></td>
            <td class="number">${queue.running ? rate(queue.tokens_per_second) : "–"}</td>
            <td><${WaitingFor} reasons=${queue.waiting_for} /></td>
          </tr>`)}</tbody>
      </table><//>`}<//>
    <//>
  `;
}

const MAX_TENANTS_SHOWN = 12;

// Of all tenants, for admins.
function TenantQueues() {
  const state = usePolled((signal) => get("v1/admin/queue", {}, signal), 5, []);
  return html`
    <${Card} title="Queues by tenant" actions=${html`<a href=${link("usage", { by: "tenant" })}>What they used</a>`}>
      <${Polled} state=${state}>${({ data, has_more }) =>
        data.length === 0
          ? html`<${Empty} title="No tenant has unfinished jobs" />`
          : html`<${Scrolled} label="Queues by tenant"><table>
              <thead><tr><th>Tenant</th><th>Model</th><th class="number">Queued</th><th class="number">Running</th><th class="number">Oldest</th><th class="number">A new job starts in</th></tr></thead>
              <tbody>${data.slice(0, MAX_TENANTS_SHOWN).map((queue) => html`
                <tr key=${`${queue.tenant} ${queue.model}`}>
                  <td>${queue.tenant}</td><td>${queue.model}</td>
                  <td class="number">${compact(queue.queued)}</td><td class="number">${compact(queue.running)}</td>
                  <td class="number">${queue.queued ? duration(queue.oldest_queued_seconds) : "–"}</td>
                  <td class="number"><${Eta} seconds=${queue.eta_seconds} /></td>
                </tr>`)}</tbody>
            </table><//>
            ${(has_more || data.length > MAX_TENANTS_SHOWN) && html`<p class="soft">The ${MAX_TENANTS_SHOWN} longest of ${has_more ? "more than " : ""}${data.length}.</p>`}`}<//>
    <//>
  `;
}

const CacheUse = ({ worker }) => {
  if (worker.cache_usage === null) return html`<span class="soft">–</span>`;
  return html`<div class="slots"><${Meter} value=${worker.cache_usage} max=${1} tone=${worker.cache_usage > 0.95 ? "wait" : "good"} label=${`${percent(worker.cache_usage)} of the key/value cache is in use`} /><span>${percent(worker.cache_usage)}</span></div>`;
};

function Workers({ models }) {
  const workers = models.flatMap((model) => model.workers.map((worker) => ({ ...worker, model: model.id })));
  workers.sort((one, other) => one.hostname.localeCompare(other.hostname, "en", { numeric: true }) || one.model.localeCompare(other.model));
  return html`
    <${Card} title="Workers" actions=${html`<a href=${link("models")}>Load, unload, drain</a>`}>
      ${workers.length === 0
        ? html`<${Empty} title="No worker has reported within 15 seconds">Start one with <code>celeriac worker --model ID</code>. Jobs that are accepted meanwhile wait for it.<//>`
        : html`<${Shortened} rows=${workers} first=${NUM_SHOWN} name="workers">${(shown) => html`<${Scrolled} label="Workers"><table>
            <thead><tr><th>Worker</th><th>Model</th><th>State</th><th class="wide">Batch</th><th class="wide">Cache</th><th class="number">Memory</th><th class="number">Tokens/s</th><th>Started</th></tr></thead>
            <tbody>${shown.map((worker) => html`
              <tr key=${`${worker.hostname} ${worker.model} ${worker.started_at}`}>
                <td class="mono">${worker.hostname}</td>
                <td>${worker.model}</td>
                <td><${Status} of=${worker.drained_since ? "draining" : worker.state}>${worker.drained_since ? "drained" : worker.state}${worker.load_percent !== null ? ` ${worker.load_percent} %` : ""}<//></td>
                <td><div class="slots"><${Meter} value=${worker.num_running} max=${worker.max_num_seqs} label=${`${worker.num_running} of ${worker.max_num_seqs} slots are taken`} /><span>${worker.num_running} / ${worker.max_num_seqs}</span></div></td>
                <td><${CacheUse} worker=${worker} /></td>
                <td class="number">${bytes(worker.memory_bytes)}</td>
                <td class="number">${worker.num_running ? rate(worker.tokens_per_second) : "–"}</td>
                <td><${Time} at=${worker.started_at} /></td>
              </tr>`)}</tbody>
          </table><//>`}<//>`}
    <//>
  `;
}

function RunningJob({ job }) {
  const stream = useStream(job.id);
  return html`
    <article class="running">
      <header><${JobLink} id=${job.id} /><span class="soft">${job.model}</span><span class="soft end">${stream.numTokens ? plural(stream.numTokens, "token") : ""}</span></header>
      <${Output} text=${stream.texts[0]} isLive=${!stream.job} label=${`Output of ${job.id}`} placeholder="Waiting for the first token" />
    </article>
  `;
}

function RunningNow() {
  const ask = (signal) => get("v1/jobs", { status: "in_progress", limit: NUM_SHOWN_RUNNING }, signal);
  const running = usePolled(ask, 4, []);
  return html`
    <${Card} title="Running now" actions=${html`<a href=${link("jobs", { status: "in_progress" })}>All running jobs</a>`}>
      <${Polled} state=${running}>${({ data }) =>
        data.length === 0
          ? html`<${Empty} title="No job of yours is running">Start one in the <a href=${link("playground")}>playground</a>, or see what <a href=${link("jobs")}>ran before</a>.<//>`
          : html`<div class="runnings">${data.map((job) => html`<${RunningJob} key=${job.id} job=${job} />`)}</div>`}<//>
    <//>
  `;
}

const TOKENS = [{ name: "tokens/s", tone: "--good", of: (sample) => sample.tokensPerSecond }];
const JOBS = [
  { name: "running", tone: "--run", of: (sample) => sample.running },
  { name: "queued", tone: "--wait", of: (sample) => sample.queued },
];

const Charts = ({ samples }) => html`
  <div class="pair">
    <section class="card"><${Chart} title="Tokens per second" samples=${samples} series=${TOKENS} format=${rate} /></section>
    <section class="card"><${Chart} title="Jobs" samples=${samples} series=${JOBS} format=${compact} /></section>
  </div>
`;

const Blind = ({ state }) => html`
  <${Findings} state=${state} />
  ${state.samples.length > 0 && html`<${Charts} samples=${state.samples} />`}
  <${Card}><${Empty} title="Queues, workers and jobs are not known without the database">They are shown again as soon as it answers${state.health.database === "ok" ? " in time" : ". What runs pauses until then; nothing is lost"}.<//><//>
`;

export function Overview({ live }) {
  return html`
    <h1 class="unseen">Overview</h1>
    <${Polled} state=${live}>${(state) => state.isBlind ? html`<${Blind} state=${state} />` : html`
      <${Findings} state=${state} />
      <${Tiles} health=${state.health} queues=${state.queues} />
      <${Charts} samples=${state.samples} />
      <${Queues} queues=${state.queues} />
      ${state.models && html`<${TenantQueues} />`}
      ${state.models && html`<${Workers} models=${state.models} />`}
      <${RunningNow} />`}<//>
  `;
}
