// Models and, for admins, their workers: load, unload, drain, resume.

import { get, post } from "./api.js";
import { compact, duration, rate } from "./format.js";
import { link, usePolled } from "./hooks.js";
import { html, useState } from "./html.js";
import { Card, Chip, Confirmed, Empty, Field, Meter, Polled, Problem, Scrolled, Shortened, Status, Time, useAction } from "./parts.js";
import { Pulls } from "./pulls.js";

function Worker({ worker, act, reload }) {
  const order = (verb) => act(() => post(`v1/admin/workers/${encodeURIComponent(worker.hostname)}/${verb}`)).then(reload);
  return html`
    <tr>
      <td class="mono">${worker.hostname}</td>
      <td><${Status} of=${worker.drained_since ? "draining" : worker.state}>${worker.drained_since ? "drained" : worker.state}<//>${worker.ready_in_seconds !== null && html` <span class="soft">ready in ${duration(worker.ready_in_seconds)}</span>`}</td>
      <td><div class="slots"><${Meter} value=${worker.num_running} max=${worker.max_num_seqs} label=${`${worker.num_running} of ${worker.max_num_seqs} slots are taken`} /><span>${worker.num_running} / ${worker.max_num_seqs}</span></div></td>
      <td class="number">${worker.num_running ? rate(worker.tokens_per_second) : "–"}</td>
      <td><${Time} at=${worker.started_at} /></td>
      <td class="actions">${worker.drained_since
        ? html`<button type="button" onClick=${() => order("resume")}>Resume</button>`
        : html`<${Confirmed} label="Drain" question="Let its jobs end and give it no more?" onConfirm=${() => order("drain")} />`}</td>
    </tr>
  `;
}

function Loading({ model, card }) {
  const worker = model.workers.find((one) => one.state === "loading");
  if (!worker) return null;
  const known = worker.load_percent ?? card?.load_percent;
  return html`<div class="slots"><${Meter} value=${known ?? 0} max=${100} label=${`${model.id} is loading`} /><span>${known === null || known === undefined ? "loading" : `${known} %`}${worker.ready_in_seconds ? `, ${duration(worker.ready_in_seconds)} left` : ""}</span></div>`;
}

function Administered({ model, card, reload }) {
  const [act, error] = useAction();
  const order = (verb) => act(() => post(`v1/admin/models/${model.id}/${verb}`)).then(reload);
  return html`
    <${Card} title=${model.id} actions=${html`
      <${Status} of=${model.status} />
      ${model.is_loaded ? html`<${Confirmed} label="Unload" question="Stop its engines? Its jobs will wait." onConfirm=${() => order("unload")} />` : html`<button type="button" class="primary" onClick=${() => order("load")}>Load</button>`}`}>
      <p class="soft">${card?.task && card.task !== "generation" && html`<${Chip} tone="run">${card.task}<//>`}<${Chip}>context ${compact(model.max_model_len)} tokens<//> <${Chip} title=${model.revision}>revision ${model.revision.slice(0, 24)}<//> <a href=${link("jobs", { model: model.id })}>its jobs</a></p>
      ${card?.unavailable && html`<${Problem} error=${{ message: card.unavailable }} />`}
      <${Loading} model=${model} card=${card} />
      ${model.workers.length > 0
        ? html`<${Scrolled} label="Workers"><table>
            <thead><tr><th>Worker</th><th>State</th><th class="wide">Batch</th><th class="number">Tokens/s</th><th>Started</th><th><span class="unseen">Actions</span></th></tr></thead>
            <tbody>${model.workers.map((worker) => html`<${Worker} key=${`${worker.hostname} ${worker.started_at}`} worker=${worker} act=${act} reload=${reload} />`)}</tbody>
          </table><//>`
        : html`<p class="soft">No worker serves it. Start one with <code>celeriac worker --model ${model.id}</code>.</p>`}
      ${error && html`<${Problem} error=${error} />`}
    <//>
  `;
}

const Served = ({ card }) => html`
  <tr>
    <td>${card.id}${card.parent && html` <${Chip}>adapter of ${card.parent}<//>`}${card.task && card.task !== "generation" && html` <${Chip} tone="run">${card.task}<//>`}</td>
    <td>${card.unavailable ? html`<${Status} of="failed">unavailable<//>` : card.load_percent !== null ? html`<${Status} of="loading">loading ${card.load_percent} %<//>` : html`<${Status} of=${card.loaded ? "loaded" : "waiting"}>${card.loaded ? "ready" : "not loaded"}<//>`}</td>
    <td class="number">${compact(card.max_model_len)}</td>
    <td class="wraps">${card.unavailable}</td>
  </tr>
`;

// Models with workers before those without; otherwise in the order of models.toml.
const liveFirst = (one, other) => Number(other.workers.length > 0) - Number(one.workers.length > 0);

const NUM_SHOWN = 20; // models
const NUM_WITHOUT_A_FILTER = 8;

export function Models({ live, isAdmin }) {
  const [wanted, want] = useState("");
  const isWanted = ({ id }) => id.toLowerCase().includes(wanted.trim().toLowerCase());
  const cards = usePolled((signal) => get("v1/models", {}, signal), 5, []);
  const byId = new Map(cards.data?.data.map((card) => [card.id, card]));
  const statuses = live.data?.isBlind ? null : live.data?.models;
  const areWorkersShown = isAdmin && !live.data?.isBlind;
  const administered = new Set(statuses?.map((model) => model.id));
  const rest = areWorkersShown && !statuses ? [] : cards.data?.data.filter((card) => !administered.has(card.id)) ?? [];
  const isLong = byId.size > NUM_WITHOUT_A_FILTER;
  return html`
    <h1>Models</h1>
    ${isLong && html`<div class="filters choices"><${Field} label="Find a model"><input type="search" value=${wanted} maxlength="128" autocomplete="off" spellcheck="false" placeholder="a part of its name" onInput=${({ target }) => want(target.value)} /><//></div>`}
    ${areWorkersShown && html`<${Polled} state=${live}>${({ models }) => html`<${Shortened} rows=${(models ?? []).filter(isWanted).sort(liveFirst)} first=${NUM_SHOWN} name="models">${(shown) => shown.map((model) => html`<${Administered} key=${model.id} model=${model} card=${byId.get(model.id)} reload=${live.reload} />`)}<//>`}<//>`}
    ${(rest.length > 0 || !areWorkersShown) && html`
      <${Card} title=${areWorkersShown ? "Adapters and unavailable models" : "Served here"}><${Polled} state=${cards}>${() => rest.length === 0
        ? html`<${Empty} title="No models are served">An administrator pulls one, or adds it to models.toml.<//>`
        : html`<${Scrolled} label="Models"><table><thead><tr><th>Model</th><th>State</th><th class="number">Context</th><th>Why</th></tr></thead><tbody>${rest.filter(isWanted).map((card) => html`<${Served} key=${card.id} card=${card} />`)}</tbody></table><//>`}<//><//>`}
    ${isAdmin && html`<${Pulls} />`}
  `;
}
