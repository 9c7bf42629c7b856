// Failed jobs with what each attempt came to. Each can be run again from the start.

import { get, may, post } from "./api.js";
import { duration, plural, secondsBetween } from "./format.js";
import { link, usePolled, visit } from "./hooks.js";
import { html } from "./html.js";
import { Card, Chip, Confirmed, Empty, JobLink, Polled, Problem, Scrolled, Time, useAction } from "./parts.js";

const POISON = "poison_job";

function Attempts({ attempts }) {
  return html`
    <details>
      <summary>${plural(attempts.length, "attempt")}</summary>
      <${Scrolled} label="Attempts"><table>
        <thead><tr><th class="number">Attempt</th><th>Worker</th><th>Outcome</th><th class="number">Took</th><th class="number">Tokens</th></tr></thead>
        <tbody>${attempts.map((one) => html`<tr key=${one.attempt}><td class="number">${one.attempt}</td><td class="mono">${one.worker ?? "not registered"}</td><td>${one.outcome}${one.error_code ? `: ${one.error_code}` : ""}</td><td class="number">${duration(secondsBetween(one.started_at, one.ended_at))}</td><td class="number">${one.num_tokens}</td></tr>`)}</tbody>
      </table><//>
    </details>
  `;
}

function Letter({ job }) {
  const [act, error, isBusy] = useAction();
  const isPoison = job.error?.code === POISON;
  const open = (made) => made && visit(`jobs/${made.id}`);
  const replay = (body) => act(() => post(`v1/dead_letters/${job.id}/replay`, body)).then(open);
  return html`
    <li class="letter">
      <header><${JobLink} id=${job.id} /><span>${job.model}</span>${job.error && html`<${Chip} tone="bad">${job.error.code}<//>`}<span class="soft end"><${Time} at=${job.finished_at} /></span></header>
      <p>${job.error?.message}</p>
      <${Attempts} attempts=${job.attempts ?? []} />
      ${may("submit") && html`<div class="actions">
        ${isPoison
          ? html`<${Confirmed} label="Replay alone" question="It has crashed an engine. Run it once more, alone?" onConfirm=${() => replay({ allow_poison: true })} />`
          : html`<button type="button" disabled=${isBusy} onClick=${() => replay({})}>Replay</button>`}
      </div>`}
      ${error && html`<${Problem} error=${error} />`}
    </li>
  `;
}

export function DeadLetters({ address }) {
  const after = address.query.get("after");
  const state = usePolled((signal) => get("v1/dead_letters", { after, limit: 20 }, signal), 10, [after]);
  return html`
    <h1>Dead letters</h1>
    <p class="soft">Jobs that failed for good, with each of their attempts. A replay is a new job from the same request; a retry, on the job's page, goes on from its output.</p>
    <${Card}><${Polled} state=${state}>${({ data, has_more }) => html`
      ${data.length === 0 ? html`<${Empty} title="No failed jobs">Jobs come here when their attempts are used up, or when their request crashes engines.<//>` : html`<ul class="batches">${data.map((job) => html`<${Letter} key=${job.id} job=${job} />`)}</ul>`}
      <nav class="pages" aria-label="Pages">${after && html`<a href=${link("dead-letters")}>Newest</a>`}${has_more && html`<a href=${link("dead-letters", { after: data[data.length - 1].id })}>Older</a>`}</nav>`}<//><//>
  `;
}
