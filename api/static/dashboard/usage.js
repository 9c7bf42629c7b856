// What was used and what it cost: of the own tenant, with an admin key of all.

import { get } from "./api.js";
import { compact, count, duration } from "./format.js";
import { link, usePolled, visit } from "./hooks.js";
import { html } from "./html.js";
import { Card, Empty, Field, Meter, Polled, Scrolled } from "./parts.js";

const PERIODS = { 1: "today and yesterday", 7: "7 days", 30: "30 days", 90: "90 days" };
const DAY_MILLISECONDS = 86_400_000;

const startOf = (days) => new Date(Date.now() - days * DAY_MILLISECONDS).toISOString().slice(0, 10);

const tokensOf = (group) => group.prompt_tokens + group.output_tokens;

const costOf = (group, currency) => (group.cost === null ? "–" : `${Number(group.cost).toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 4 })} ${currency}`);

function Total({ total, currency }) {
  return html`
    <dl class="tiles">
      <div class="tile"><dt>Jobs</dt><dd>${compact(total.num_jobs)}</dd><dd class="soft">${total.num_attempts === 1 ? "1 attempt" : `${compact(total.num_attempts)} attempts`}</dd></div>
      <div class="tile"><dt>Prompt tokens</dt><dd>${compact(total.prompt_tokens)}</dd><dd class="soft">${compact(total.cached_tokens)} from the cache</dd></div>
      <div class="tile"><dt>Output tokens</dt><dd>${compact(total.output_tokens)}</dd><dd class="soft">${compact(total.reasoning_tokens)} reasoning</dd></div>
      <div class="tile"><dt>Engine time</dt><dd>${duration(total.engine_seconds)}</dd><dd class="soft">${duration(total.queue_seconds)} in queues</dd></div>
      <div class="tile"><dt>Cost</dt><dd>${costOf(total, currency)}</dd><dd class="soft">by the prices in models.toml</dd></div>
    </dl>
  `;
}

function Groups({ groups, by, currency }) {
  const most = Math.max(1, ...groups.map(tokensOf));
  const ordered = by === "day" ? [...groups].sort((one, other) => other.day.localeCompare(one.day)) : [...groups].sort((one, other) => tokensOf(other) - tokensOf(one));
  const name = (group) => group[by] ?? "without a key";
  return html`
    <${Scrolled} label="Usage"><table>
      <thead><tr><th>${by[0].toUpperCase() + by.slice(1)}</th><th class="wide">Tokens</th><th class="number">Prompt</th><th class="number">Output</th><th class="number">Jobs</th><th class="number">Engine time</th><th class="number">Cost</th></tr></thead>
      <tbody>${ordered.map((group) => html`
        <tr key=${name(group)}>
          <td>${name(group)}</td>
          <td><div class="slots"><${Meter} value=${tokensOf(group)} max=${most} label=${`${name(group)}: ${count(tokensOf(group))} tokens`} /><span>${compact(tokensOf(group))}</span></div></td>
          <td class="number">${count(group.prompt_tokens)}</td><td class="number">${count(group.output_tokens)}</td><td class="number">${count(group.num_jobs)}</td>
          <td class="number">${duration(group.engine_seconds)}</td><td class="number">${costOf(group, currency)}</td>
        </tr>`)}</tbody>
    </table><//>
  `;
}

export function Usage({ address, isAdmin }) {
  const days = Number(address.query.get("days") ?? 30);
  const by = address.query.get("by") ?? "day";
  const choices = isAdmin ? ["day", "model", "tenant", "key"] : ["day", "model", "key"];
  const state = usePolled((signal) => get("v1/usage", { start: startOf(days), group_by: by }, signal), 30, [days, by]);
  return html`
    <h1>Usage</h1>
    <div class="filters choices">
      <${Field} label="By"><select value=${by} onChange=${({ target }) => visit("usage", { by: target.value, days })}>${choices.map((choice) => html`<option key=${choice}>${choice}</option>`)}</select><//>
      <${Field} label="Over"><select value=${String(days)} onChange=${({ target }) => visit("usage", { by, days: target.value })}>${Object.entries(PERIODS).map(([value, label]) => html`<option key=${value} value=${value}>${label}</option>`)}</select><//>
    </div>
    <${Polled} state=${state}>${({ data, total, currency }) => html`
      <${Total} total=${total} currency=${currency} />
      <${Card}>${data.length === 0 ? html`<${Empty} title="Nothing was used">Jobs count when their attempts end. <a href=${link("playground")}>Try one</a>.<//>` : html`<${Groups} groups=${data} by=${by} currency=${currency} />`}<//>`}<//>
  `;
}
