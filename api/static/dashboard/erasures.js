// Erasing all that one user of a tenant has asked for and got: a form that asks for it, and how far each erasure is.

import { get, post } from "./api.js";
import { count, plural } from "./format.js";
import { usePolled } from "./hooks.js";
import { html, useRef, useState } from "./html.js";
import { Chip, Confirmed, Field, Polled, Problem, Scrolled, Status, Time, useAction } from "./parts.js";

const RUNNING_SECONDS = 2;
const IDLE_SECONDS = 15;
const NUM_FILES = 5; // named at once

const whose = (erasure) => (erasure.key_id ? html`key <span class="mono">${erasure.key_id}</span>` : html`a value of <span class="mono">${erasure.metadata}</span>`);

function Erased({ erasure }) {
  const counts = [plural(erasure.jobs, "job"), plural(erasure.batches, "batch", "batches"), plural(erasure.conversations, "conversation")];
  if (erasure.archived_jobs) counts.push(`${count(erasure.archived_jobs)} archived`);
  const files = erasure.files_to_delete;
  return html`
    ${counts.join(", ")}
    ${erasure.unfinished_batches > 0 && html`<p class="tail">${plural(erasure.unfinished_batches, "batch is", "batches are")} stopping first.</p>`}
    ${files.length > 0 && html`<p class="tail">Files of others with lines of this user, to be deleted by hand: <span class="mono">${files.slice(0, NUM_FILES).join(", ")}</span>${files.length > NUM_FILES ? ` and ${count(files.length - NUM_FILES)} more` : ""}</p>`}
    ${erasure.error && html`<p class="tail bad">${erasure.error}</p>`}`;
}

const Row = ({ erasure }) => html`
  <tr>
    <td>${whose(erasure)}</td>
    <td><${Status} of=${erasure.status}>${erasure.status === "running" ? `erasing ${erasure.step === "archive" ? "the archive" : erasure.step}` : "done"}<//></td>
    <td><${Erased} erasure=${erasure} /></td>
    <td><${Time} at=${erasure.created_at} /></td>
  </tr>
`;

// What is asked for, or null while it is not whole. A value is what was typed: it may begin or end with a space.
function bodyOf({ by, name, value, keyId }) {
  const [whole, id] = [name.trim(), keyId.trim()];
  if (by === "key") return id ? { key_id: id } : null;
  return whole && value ? { metadata: { [whole]: value } } : null;
}

const named = ({ key_id, metadata }) => (key_id ? `the key ${key_id}` : `the user with the metadata ${Object.entries(metadata).map(([name, value]) => `${name}=${JSON.stringify(value)}`)}`);

function Ask({ path, reload }) {
  const [asked, setAsked] = useState({ by: "metadata", name: "", value: "", keyId: "" });
  const [act, error] = useAction();
  const form = useRef(null);
  const put = (field) => ({ target }) => setAsked((earlier) => ({ ...earlier, [field]: target.value }));
  const isByKey = asked.by === "key";
  const body = bodyOf(asked);
  const erase = () => act(() => post(path, body)).then((made) => made && (setAsked({ ...asked, name: "", value: "", keyId: "" }), reload()));
  return html`
    <form ref=${form} onSubmit=${(event) => event.preventDefault()}>
      <div class="grid four">
        <${Field} label="Whose"><select value=${asked.by} onChange=${put("by")}><option value="metadata">by metadata</option><option value="key">by key</option></select><//>
        ${isByKey
          ? html`<${Field} label="Key id"><input value=${asked.keyId} onInput=${put("keyId")} maxlength="64" autocomplete="off" spellcheck="false" placeholder="key_…" /><//>`
          : html`
            <${Field} label="Metadata name"><input value=${asked.name} onInput=${put("name")} maxlength="64" autocomplete="off" spellcheck="false" placeholder="user" /><//>
            <${Field} label="Metadata value"><input value=${asked.value} onInput=${put("value")} maxlength="512" autocomplete="off" spellcheck="false" placeholder="u-4711" /><//>`}
      </div>
      <div class="actions"><${Confirmed} label="Erase" question=${`Erase all jobs, batches and conversations of ${body ? named(body) : "…"}, with their texts? This cannot be undone.`} disabled=${!body} onConfirm=${erase} /></div>
      ${error && html`<${Problem} error=${error} />`}
    </form>
  `;
}

export function Erasures({ tenant }) {
  const path = `v1/admin/tenants/${encodeURIComponent(tenant)}/erasures`;
  const seconds = ({ data }) => (data.some((erasure) => erasure.status === "running") ? RUNNING_SECONDS : IDLE_SECONDS);
  const state = usePolled((signal) => get(path, { limit: 20 }, signal), seconds, [path]);
  return html`
    <div class="inset">
      <p class="soft">Maintenance erases in the background, also while this page is closed. What arrives later is not erased; ask again then. <${Chip}>the value is forgotten at the end<//></p>
      <${Ask} path=${path} reload=${state.reload} />
      <${Polled} state=${state}>${({ data }) =>
        data.length > 0 && html`<${Scrolled} label="Erasures"><table>
          <thead><tr><th>Whose</th><th>State</th><th>Erased</th><th>Asked for</th></tr></thead>
          <tbody>${data.map((erasure) => html`<${Row} key=${erasure.id} erasure=${erasure} />`)}</tbody>
        </table><//>`}<//>
    </div>
  `;
}
