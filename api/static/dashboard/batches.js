// Batches with their progress, their answers to download, and one made from a file.

import { get, may, post, send } from "./api.js";
import { count, duration, percent, plural, secondsSince, toDate } from "./format.js";
import { link, useClock, usePolled } from "./hooks.js";
import { html, useRef } from "./html.js";
import { Card, Code, Confirmed, Empty, Field, Meter, Polled, Problem, Status, Time, useAction } from "./parts.js";

const ENDED = new Set(["completed", "failed", "expired", "cancelled"]);
const ENDPOINTS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"];

// The key travels in a header, which a plain link cannot send.
async function download(fileId, name) {
  const response = await send("GET", `v1/files/${fileId}/content`);
  const url = URL.createObjectURL(await response.blob());
  const anchor = Object.assign(document.createElement("a"), { href: url, download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function NewBatch({ onMade }) {
  const [act, error, isBusy] = useAction();
  const form = useRef(null);
  const onSubmit = (event) => {
    event.preventDefault();
    const { file, endpoint } = form.current.elements;
    const upload = new FormData();
    upload.set("purpose", "batch");
    upload.set("file", file.files[0]);
    act(async () => {
      const stored = await (await send("POST", "v1/files", { body: upload })).json();
      await post("v1/batches", { input_file_id: stored.id, endpoint: endpoint.value, completion_window: "24h" });
      form.current.reset();
      onMade();
    });
  };
  return html`
    <${Card} title="New batch">
      <form class="filters" ref=${form} onSubmit=${onSubmit}>
        <${Field} label="File of requests" hint="JSONL in OpenAI's format, one request a line"><input type="file" name="file" accept=".jsonl,.ndjson,.txt" required /><//>
        <${Field} label="Endpoint"><select name="endpoint">${ENDPOINTS.map((path) => html`<option key=${path}>${path}</option>`)}</select><//>
        <button class="primary" disabled=${isBusy}>${isBusy ? "Uploading…" : "Run"}</button>
      </form>
      ${error && html`<${Problem} error=${error} />`}
    <//>
  `;
}

function Batch({ batch, reload }) {
  const [act, error] = useAction();
  const { total, completed, failed } = batch.request_counts;
  const done = completed + failed;
  const isOver = ENDED.has(batch.status);
  const left = total - done;
  const elapsed = batch.in_progress_at ? secondsSince(batch.in_progress_at) : 0;
  const note = isOver || !done || !left ? "" : `about ${duration((elapsed / done) * left)} left`;
  return html`
    <li class="batch">
      <header><a class="mono" href=${link("jobs", { q: batch.id })} title="The jobs of this batch">${batch.id}</a><${Status} of=${batch.status} /><span class="soft">${batch.model ?? ""} ${batch.endpoint}</span><span class="soft end"><${Time} at=${batch.created_at} /></span></header>
      <${Meter} value=${done} max=${total} tone=${failed ? "wait" : "good"} label=${`${done} of ${total} requests of ${batch.id} are done`} />
      <footer>
        <span>${count(done)} of ${count(total)}${total ? ` (${percent(done / total)})` : ""}</span>
        ${failed > 0 && html`<span class="bad">${count(failed)} failed</span>`}
        ${note && html`<span class="soft">${note}</span>`}
        ${batch.usage.total_tokens > 0 && html`<span class="soft">${plural(batch.usage.total_tokens, "token")}</span>`}
        ${!isOver && html`<span class="soft">until ${toDate(batch.expires_at).toLocaleString()}</span>`}
        <span class="actions">
          ${batch.output_file_id && completed > 0 && html`<button type="button" onClick=${() => act(() => download(batch.output_file_id, `${batch.id}_output.jsonl`))}>Answers${isOver ? "" : " so far"}</button>`}
          ${batch.error_file_id && failed > 0 && html`<button type="button" onClick=${() => act(() => download(batch.error_file_id, `${batch.id}_errors.jsonl`))}>Errors${isOver ? "" : " so far"}</button>`}
          ${!isOver && may("cancel") && batch.status !== "cancelling" && html`<${Confirmed} label="Cancel" question="Cancel the rest?" onConfirm=${() => act(() => post(`v1/batches/${batch.id}/cancel`)).then(reload)} />`}
        </span>
      </footer>
      ${batch.waiting_for && html`<p class="soft">Waits: ${batch.waiting_for.message}</p>`}
      ${batch.errors?.data.slice(0, 5).map((one, index) => html`<${Problem} key=${index} error=${{ message: `${one.line ? `line ${one.line}: ` : ""}${one.message}`, param: one.param }} />`)}
      ${error && html`<${Problem} error=${error} />`}
    </li>
  `;
}

const LINE = `{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "MODEL", "messages": [{"role": "user", "content": "Hi"}]}}`;

// Shown until there is a batch.
const Teach = () => html`
  <${Empty} title="No batches yet">A batch runs a file of requests with the lowest priority, when slots are free. Each line is one request, like this one:<//>
  <${Code} text=${LINE} label="A line of a file" />
  <p class="soft">From a terminal: <code>celeriac batch run requests.jsonl -o answers.jsonl</code></p>
`;

export function Batches({ address }) {
  const after = address.query.get("after");
  const state = usePolled((signal) => get("v1/batches", { after, limit: 20 }, signal), 3, [after]);
  useClock(5);
  return html`
    <h1>Batches</h1>
    ${may("submit") && html`<${NewBatch} onMade=${state.reload} />`}
    <${Card}><${Polled} state=${state}>${({ data, has_more }) => html`
      ${data.length === 0 ? html`<${Teach} />` : html`<ul class="batches">${data.map((batch) => html`<${Batch} key=${batch.id} batch=${batch} reload=${state.reload} />`)}</ul>`}
      <nav class="pages" aria-label="Pages">${after && html`<a href=${link("batches")}>Newest</a>`}${has_more && html`<a href=${link("batches", { after: data[data.length - 1].id })}>Older</a>`}</nav>`}<//><//>
  `;
}
