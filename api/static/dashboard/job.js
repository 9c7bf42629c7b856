// One job: how it came to be where it is, what it says, and what can be done with it.

import { get, may, post, readKey, remove } from "./api.js";
import { clockTime, count, duration, moment, plural, rate, secondsBetween, secondsSince, waitingInWords } from "./format.js";
import { link, useClock, usePolled, visit } from "./hooks.js";
import { html, useEffect, useMemo, useRef, useState } from "./html.js";
import { isOver } from "./jobs.js";
import { visible } from "./json.js";
import { Card, Code, Confirmed, Copy, JobLink, LongText, Output, Polled, Problem, Status, Tabs, useAction } from "./parts.js";
import { asCurl, asOpenAI, asPython, askedOf, bodyOf } from "./request.js";
import { useStream } from "./stream.js";

const INTERRUPTIONS = {
  released: "given back by its worker, which stops or pauses; nothing is charged",
  lost: "its worker vanished, and its lease ran out",
  crashed: "the engine crashed",
  stalled: "it made no progress and was taken from its worker",
};

// [{at, tone, title, detail}], oldest first.
function timelineOf(job) {
  const steps = [{ at: job.created_at, tone: "calm", title: "Accepted", detail: job.retry_of ? html`as a retry of <${JobLink} id=${job.retry_of} />` : "committed to the database and queued" }];
  for (const attempt of job.attempts) {
    const worker = attempt.worker ?? "a worker that had not reported yet";
    steps.push({ at: attempt.started_at, tone: "run", title: attempt.attempt === 1 ? "Claimed" : "Claimed again", detail: `by ${worker}${job.attempts.length > 1 ? `, attempt ${attempt.attempt}` : ""}` });
    if (attempt.outcome in INTERRUPTIONS) {
      steps.push({ at: attempt.ended_at, tone: "wait", title: isOver(job) && attempt.ended_at === job.finished_at ? "Interrupted" : "Paused", detail: `${INTERRUPTIONS[attempt.outcome]}; ${plural(attempt.num_tokens, "token")} of this attempt are kept` });
    }
  }
  if (job.first_token_at) steps.push({ at: job.first_token_at, tone: "run", title: "First token", detail: "committed, and sent to whoever reads the stream" });
  if (isOver(job)) steps.push({ at: job.finished_at, tone: job.status === "completed" ? "good" : job.status === "failed" ? "bad" : "calm", title: job.status[0].toUpperCase() + job.status.slice(1), detail: endingOf(job) });
  return steps.sort((one, other) => new Date(one.at) - new Date(other.at));
}

function endingOf(job) {
  if (job.error) return job.error.message;
  if (job.cached) return "with the answer of an earlier job that asked for the same";
  const reasons = { stop: "the model ended its text", length: "it reached max_tokens or the end of its context", tool_calls: "the model calls tools", cancelled: "somebody cancelled it; what was written is kept", deadline: "its time was over; what was written is kept" };
  return reasons[job.finish_reason] ?? job.finish_reason ?? "";
}

function Waiting({ job, queue }) {
  if (job.status !== "queued") return null;
  return html`<li data-tone="wait" class="now"><b>Waiting</b><span>${waitingInWords(queue ?? job.queue)}</span><span class="number">${duration(secondsSince(job.created_at))}</span></li>`;
}

const stepIn = (job) => ({ at, tone, title, detail }) => html`
  <li key=${`${title}${at}`} data-tone=${tone}><b>${title}</b><span>${detail}</span><time class="number" datetime=${at} title=${moment(at)}>${at === job.created_at ? clockTime(at) : `+ ${duration(secondsBetween(job.created_at, at))}`}</time></li>`;

const NUM_FIRST_STEPS = 4;
const NUM_LAST_STEPS = 12; // of a job with many attempts

function Timeline({ job, queue }) {
  const isRunning = job.status === "in_progress";
  const [isWhole, showWhole] = useState(false);
  useClock();
  const steps = timelineOf(job);
  const numHidden = isWhole ? 0 : Math.max(0, steps.length - NUM_FIRST_STEPS - NUM_LAST_STEPS);
  return html`
    <ol class="timeline">
      ${steps.slice(0, numHidden ? NUM_FIRST_STEPS : 0).map(stepIn(job))}
      ${numHidden > 0 && html`<li key="hidden" data-tone="calm"><button type="button" class="quiet" onClick=${() => showWhole(true)}>Show ${plural(numHidden, "more step")}</button></li>`}
      ${steps.slice(numHidden ? -NUM_LAST_STEPS : 0).map(stepIn(job))}
      <${Waiting} job=${job} queue=${queue} />
      ${isRunning && html`<li data-tone="run" class="now"><b>Running</b><span>${job.cancel_requested ? "a cancel is on its way" : `on ${job.worker ?? "a worker"}`}</span><span class="number">${duration(secondsSince(job.started_at))}</span></li>`}
    </ol>
  `;
}

function Figures({ job, numTokens }) {
  const produced = isOver(job) ? job.usage?.completion_tokens : Math.max(numTokens, job.usage?.completion_tokens ?? 0);
  const end = job.finished_at ?? new Date().toISOString();
  const writing = job.first_token_at ? secondsBetween(job.first_token_at, end) : 0;
  return html`
    <dl class="tiles small">
      <div class="tile"><dt>Waited</dt><dd>${job.started_at ? duration(secondsBetween(job.created_at, job.started_at)) : "–"}</dd></div>
      <div class="tile"><dt>First token after</dt><dd>${job.first_token_at ? duration(secondsBetween(job.created_at, job.first_token_at)) : "–"}</dd></div>
      <div class="tile"><dt>Prompt tokens</dt><dd>${count(job.usage?.prompt_tokens)}${job.usage?.cached_tokens ? html` <small class="soft">${count(job.usage.cached_tokens)} cached</small>` : ""}</dd></div>
      <div class="tile"><dt>Output tokens</dt><dd>${count(produced)}</dd></div>
      <div class="tile"><dt>Tokens per second</dt><dd>${writing > 0.2 && job.status !== "queued" ? rate(produced / writing) : "–"}</dd></div>
    </dl>
  `;
}

function Outputs({ job, stream }) {
  if (job.kind === "embedding") {
    const text = job.output ? `${plural(job.output.embeddings.length, "vector")} of ${job.output.dimensions} numbers each. GET /v1/jobs/${job.id}/output has them.` : "";
    return html`<${Output} text=${text} />`;
  }
  const texts = job.output ? job.output.choices.map((choice) => choice.text) : stream.texts;
  const shown = texts.length ? texts : [""];
  return shown.map((text, index) => html`
    <div key=${index}>
      ${shown.length > 1 && html`<h3>Choice ${index + 1}</h3>`}
      <${Output} text=${text} isLive=${job.status === "in_progress"} label=${`Output, choice ${index + 1}`} placeholder=${isOver(job) ? "It ended without output" : "Waiting for the first token"} />
    </div>`);
}

function Request({ input }) {
  const { messages, prompt, inputs, model, params, ...rest } = bodyOf(input);
  return html`
    ${messages && html`<ul class="messages">${messages.map((message, index) => html`<li key=${index}><b>${message.role}</b><div class="said"><${LongText} text=${message.content} />${message.tool_calls?.map((call) => html`<code key=${call.id}>${call.name}(${call.arguments})</code>`)}</div></li>`)}</ul>`}
    ${prompt && html`<div class="output" tabindex="0" role="region" aria-label="Prompt"><${LongText} text=${prompt} /></div>`}
    ${inputs && html`<ul class="messages">${inputs.slice(0, 20).map((text, index) => html`<li key=${index}><b>${index + 1}</b><div class="said">${typeof text === "string" ? html`<${LongText} text=${text} />` : `${text.length} token ids`}</div></li>`)}</ul>`}
    <h3>Parameters</h3>
    <pre tabindex="0" role="region" aria-label="Parameters"><${LongText} text=${visible({ ...params, ...rest }, 2)} /></pre>
  `;
}

function Actions({ job, reload }) {
  const [act, error, isBusy] = useAction();
  const open = (made) => made && visit(`jobs/${made.id}`);
  const isRetryable = ["failed", "expired", "cancelled"].includes(job.status);
  const retry = () => act(() => post(`v1/jobs/${job.id}/retry`)).then(open);
  const repeat = () => act(() => post("v1/jobs", bodyOf(askedOf(job)))).then(open);
  const cancel = () => act(() => post(`v1/jobs/${job.id}/cancel`)).then(reload);
  const erase = () => act(() => remove(`v1/jobs/${job.id}`)).then((done) => done && visit("jobs"));
  return html`
    <div class="actions">
      ${!isOver(job) && may("cancel") && html`<button type="button" class="danger" disabled=${isBusy || job.cancel_requested} onClick=${cancel}>Cancel</button>`}
      ${isRetryable && may("submit") && html`<button type="button" class="primary" disabled=${isBusy} onClick=${retry} title="A new job that goes on from the output so far">Retry</button>`}
      ${isOver(job) && may("submit") && html`<button type="button" disabled=${isBusy} onClick=${repeat} title="A new job from the same request, from the start">Run again</button>`}
      ${job.kind === "generation" && !job.input?.prompt_token_ids && may("submit") && html`<a class="button" href=${link("playground", { from: job.id })}>Open in the playground</a>`}
      ${isOver(job) && may("cancel") && html`<${Confirmed} label="Delete" question="Delete it with its input and output?" onConfirm=${erase} />`}
    </div>
    ${error && html`<${Problem} error=${error} />`}
  `;
}

// Drawn once: a long request would cost much to write again with each token of the output.
function Asked({ job }) {
  return useMemo(() => {
    const body = bodyOf(askedOf(job));
    return html`
      <${Card} title="Request"><${Request} input=${job.input} /><//>
      <${Card} title="The same in code">
        <${Tabs} label="Languages" tabs=${[
          ["curl", html`<${Code} text=${asCurl(body, Boolean(readKey()))} label="curl" />`],
          ["Python", html`<${Code} text=${asPython(body)} label="Python" />`],
          ["OpenAI SDK", html`<${Code} text=${asOpenAI(body)} label="OpenAI SDK" />`],
        ]} />
      <//>`;
  }, [job.input]);
}

function Page({ job, reload }) {
  const isFollowed = !isOver(job) && job.kind === "generation";
  const stream = useStream(isFollowed ? job.id : null);
  useEffect(() => {
    if (stream.job || stream.started) reload();
  }, [stream.job, stream.started]);
  const labels = Object.entries(job.metadata);
  return html`
    <div class="title">
      <div><h1 class="mono">${job.id}</h1><${Copy} text=${job.id} label="Copy id" /></div>
      <p><${Status} of=${job.status} /> <span>${job.model}</span> <span class="soft">accepted ${moment(job.created_at)}${job.priority ? `, priority ${job.priority}` : ""}${job.deadline ? `, deadline ${moment(job.deadline)}` : ""}${job.expires_at ? `, kept until ${moment(job.expires_at)}` : ""}</span></p>
      ${labels.length > 0 && html`<p>${labels.map(([name, value]) => html`<a key=${name} class="chip" href=${link("jobs", { q: `${name}=${value}` })}>${name}=${value}</a>`)}</p>`}
    </div>
    <${Actions} job=${job} reload=${reload} />
    ${stream.error && html`<${Problem} error=${stream.error} />`}
    <${Figures} job=${job} numTokens=${stream.numTokens} />
    <div class="pair uneven">
      <${Card} title="Output" actions=${job.output?.text && html`<${Copy} text=${job.output.text} />`}><${Outputs} job=${job} stream=${stream} /><//>
      <${Card} title="Timeline"><${Timeline} job=${job} queue=${stream.queue} /><//>
    </div>
    ${job.input && html`<${Asked} job=${job} />`}
  `;
}

// The request may have megabytes and never changes, so it is asked for once; what has ended does not change either.
export function JobPage({ id }) {
  const input = useRef(null);
  const ask = async (signal) => {
    const job = await get(`v1/jobs/${encodeURIComponent(id)}`, { include: input.current ? "attempts" : "input,attempts" }, signal);
    input.current ??= job.input;
    return { ...job, input: input.current };
  };
  const state = usePolled(ask, (job) => (isOver(job) ? 0 : 3), [id]);
  return html`<p class="back"><a href=${link("jobs")}>Jobs</a></p>${!state.data && html`<h1 class="unseen">Job</h1>`}<${Polled} state=${state}>${(job) => html`<${Page} job=${job} reload=${state.reload} />`}<//>`;
}
