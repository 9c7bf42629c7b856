// Try a model, or two side by side. Each answer is a job, whose id is in the address: a reload, or another browser with
// the same key, reads it from its start and goes on.

import { get, may, post, readKey } from "./api.js";
import { plural, waitingInWords } from "./format.js";
import { useKept, usePolled, visit } from "./hooks.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { Card, Code, Empty, Field, JobLink, Output, Polled, Problem, Status, Tabs, useAction } from "./parts.js";
import { EMPTY_FORM, PlaygroundForm, formOf, readForm } from "./playground_form.js";
import { asCurl, asOpenAI, asPython, askedOf } from "./request.js";
import { useStream } from "./stream.js";

// The API names a field by its path, such as params.temperature; the form by the field's own name.
const nameOf = (param) => param?.replace(/^params\./, "").split(/[.[]/)[0];

function Answer({ id, onContinue }) {
  const stream = useStream(id, "start");
  const [act, error] = useAction();
  const job = stream.job;
  const texts = job?.output ? job.output.choices.map((choice) => choice.text) : stream.texts;
  const status = job?.status ?? (stream.started || stream.numTokens ? "in_progress" : "queued");
  const shown = texts.length ? texts : [""];
  return html`
    <article class="answer">
      <header><${Status} of=${status} /><${JobLink} id=${id} /><span class="soft end">${stream.numTokens ? plural(stream.numTokens, "token") : ""}${job?.finish_reason ? `, ${job.finish_reason}` : ""}</span></header>
      ${shown.map((text, index) => html`<${Output} key=${index} text=${text} isLive=${!job && !stream.error} label=${`Answer ${index + 1}`} placeholder=${job ? "It ended without output" : stream.queue ? `Waiting ${waitingInWords(stream.queue)}` : "Waiting for the first token"} />`)}
      ${stream.connection === "waiting" && !job && !stream.error && html`<p class="soft" role="status">Connecting. The job runs on meanwhile.</p>`}
      ${job?.error && html`<${Problem} error=${job.error} />`}
      ${stream.error && html`<${Problem} error=${stream.error} />`}
      ${error && html`<${Problem} error=${error} />`}
      <div class="actions">
        ${!job && may("cancel") && html`<button type="button" class="danger" onClick=${() => act(() => post(`v1/jobs/${id}/cancel`))}>Stop</button>`}
        ${job?.output && onContinue && html`<button type="button" onClick=${() => onContinue(texts[0])}>Continue the chat</button>`}
      </div>
    </article>
  `;
}

function ModelChoice({ label, models, value, onChoose }) {
  return html`<${Field} label=${label}><select value=${value} onChange=${({ target }) => onChoose(target.value)}>
    ${models.map((model) => html`<option key=${model.id} value=${model.id} disabled=${Boolean(model.unavailable)}>${model.id}${model.unavailable ? " (unavailable)" : model.loaded === false ? " (not loaded)" : ""}</option>`)}
  </select><//>`;
}

// A field of the form whose text is no number has no value for the page to read.
const withoutNumbers = (form) => Object.fromEntries([...form.elements].filter((control) => control.validity?.badInput).map((control) => [control.name, "it is not a number"]));

function Bench({ models, form, setForm, query }) {
  const [act, refusal, isBusy] = useAction();
  const [unreadable, setUnreadable] = useState({});
  const answers = useRef(null);
  const change = (changed) => {
    setForm((earlier) => ({ ...earlier, ...changed }));
    setUnreadable({});
  };
  const usable = models.filter((model) => !model.unavailable);
  const preferred = usable.find((model) => model.loaded) ?? usable[0];
  const first = models.some((model) => model.id === form.models[0]) ? form.models[0] : preferred?.id;
  const others = usable.filter((model) => model.id !== first);
  const other = others.find((model) => model.loaded) ?? others[0];
  const second = models.some((model) => model.id === form.models[1]) ? form.models[1] : (other?.id ?? first);
  const chosen = form.isCompared ? [first, second] : [first];
  const ids = ["a", "b"].map((side) => query.get(side)).filter(Boolean);
  const run = (event) => {
    event.preventDefault();
    const { body, errors } = readForm(form);
    const wrong = { ...errors, ...withoutNumbers(event.currentTarget) };
    setUnreadable(wrong);
    if (Object.keys(wrong).length) return;
    act(async () => {
      const made = await Promise.all(chosen.map((model) => post("v1/jobs", { ...body, model })));
      visit("playground", { a: made[0].id, b: made[1]?.id });
      answers.current?.scrollIntoView({ block: "nearest" }); // a long form, or a phone, may have left it out of sight
    });
  };
  const goOn = (text) => change({ messages: [...form.messages, { role: "assistant", content: text }, { role: "user", content: "" }] });
  const named = refusal?.param ? { [nameOf(refusal.param)]: refusal.message } : {};
  const { body } = readForm(form);
  const whole = { model: first, ...body };
  const hasKey = Boolean(readKey());
  return html`
    <form class="bench" noValidate onSubmit=${run} onKeyDown=${(event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && run(event)}>
      <${Card} title="Request" actions=${html`<button type="button" class="quiet" onClick=${() => setForm(EMPTY_FORM)}>Start over</button>`}>
        <div class="grid two">
          <${ModelChoice} label=${form.isCompared ? "Left model" : "Model"} models=${models} value=${first} onChoose=${(id) => change({ models: [id, form.models[1]] })} />
          ${form.isCompared && html`<${ModelChoice} label="Right model" models=${models} value=${second} onChoose=${(id) => change({ models: [form.models[0], id] })} />`}
        </div>
        <label class="switch"><input type="checkbox" checked=${form.isCompared} onChange=${({ target }) => change({ isCompared: target.checked })} /><span>Two side by side</span></label>
        <${PlaygroundForm} form=${form} change=${change} errors=${{ ...named, ...unreadable }} />
        ${refusal && html`<${Problem} error=${refusal} />`}
        ${Object.entries(unreadable).map(([param, message]) => html`<${Problem} key=${param} error=${{ param, message }} />`)}
        <div class="actions"><button class="primary" disabled=${isBusy || !first || !may("submit")}>${isBusy ? "Sending…" : "Run"}</button><small class="soft">${may("submit") ? "Ctrl + Enter" : "This key may not submit jobs: it lacks the scope submit."}</small></div>
      <//>
    </form>
    <div class="answers" ref=${answers}>
      <${Card} title="Answer">
        ${ids.length === 0
          ? html`<${Empty} title="Nothing asked yet">The answer appears here as it is written. It is a job like any other: it goes on if you close this page.<//>`
          : html`<div class="sides">${ids.map((id) => html`<${Answer} key=${id} id=${id} onContinue=${form.isChat ? goOn : null} />`)}</div>`}
      <//>
      <${Card} title="The same in code">
        <${Tabs} label="Languages" tabs=${[
          ["curl", html`<${Code} text=${asCurl(whole, hasKey)} label="curl" />`],
          ["Python", html`<${Code} text=${asPython(whole)} label="Python" />`],
          ["OpenAI SDK", html`<${Code} text=${asOpenAI(whole)} label="OpenAI SDK" />`],
        ]} />
      <//>
    </div>
  `;
}

// Those that are made for vectors and scores write no text. What an unavailable one is for is not known.
const writers = (models) => models.filter((model) => model.task === "generation" || model.task === null);

export function Playground({ address }) {
  const { query } = address;
  const [form, setForm] = useKept("celeriac.playground", EMPTY_FORM);
  const [error, setError] = useState(null);
  const taken = useRef("");
  const from = query.get("from");
  useEffect(() => {
    if (!from || taken.current === from) return;
    taken.current = from;
    get(`v1/jobs/${from}`, { include: "input" }).then(
      (job) => {
        setForm(formOf(askedOf(job), job.model));
        visit("playground", { a: job.id });
      },
      (refusal) => setError(refusal),
    );
  }, [from]);
  const models = usePolled((signal) => get("v1/models", {}, signal), 10, []);
  return html`
    <h1 class="unseen">Playground</h1>
    ${error && html`<${Problem} error=${error} />`}
    <div class="playground"><${Polled} state=${models}>${({ data }) => (writers(data).length === 0
      ? html`<${Empty} title="No model that writes text is served">An administrator pulls one, or adds it to models.toml.<//>`
      : html`<${Bench} models=${writers(data)} form=${form} setForm=${setForm} query=${query} />`)}<//></div>
  `;
}
