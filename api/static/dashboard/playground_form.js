// The playground's form: messages or a prompt, the sampling parameters, tools and the format of the output.

import { html } from "./html.js";
import { numberOf } from "./json.js";
import { FORMATS, PARAMETERS, json, readParameters } from "./parameters.js";
import { Field } from "./parts.js";

const ROLES = ["system", "user", "assistant", "tool"];
const EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

export const EMPTY_FORM = {
  isChat: true,
  messages: [{ role: "user", content: "Tell me a story about a brave little fox." }],
  prompt: "Once upon a time",
  models: ["", ""],
  isCompared: false,
  params: { max_tokens: "200" },
  format: "",
  formatText: "",
  tools: "",
  effort: "",
  templateValues: "",
  priority: "",
  metadata: "",
};

const OPTIONS = [
  { field: "tools", name: "tools", read: json, isChat: true },
  { field: "templateValues", name: "chat_template_kwargs", read: json, isChat: true },
  { field: "effort", name: "reasoning_effort", read: (text) => text, isChat: true },
  { field: "priority", name: "priority", read: numberOf },
  { field: "metadata", name: "metadata", read: json },
];

// {body, errors}: the request without its model, and what cannot be read, by the name of its field.
export function readForm(form) {
  const { params, errors } = readParameters(form);
  const body = form.isChat ? { messages: form.messages } : { prompt: form.prompt };
  if (Object.keys(params).length) body.params = params;
  for (const { field, name, read, isChat } of OPTIONS) {
    if (!form[field]?.trim() || (isChat && !form.isChat)) continue;
    try {
      body[name] = read(form[field]);
    } catch (error) {
      errors[name] = error.message;
    }
  }
  const last = form.messages[form.messages.length - 1];
  if (form.isChat && last?.role === "assistant") body.continue_final_message = true;
  return { body, errors };
}

const asJson = (object) => (object && Object.keys(object).length ? JSON.stringify(object) : "");

// The form that would send a job's request again. Messages keep what the form does not show, such as calls of tools.
export function formOf(input, model) {
  const { messages, prompt, params = {}, tools, metadata, chat_template_kwargs: templateValues, priority } = input;
  const { structured_output: output, ...plain } = params;
  const given = {};
  for (const { name, kind } of PARAMETERS) {
    const value = plain[name];
    if (value === undefined || value === null) continue;
    if (kind === "switch") given[name] = value;
    else if (kind === "lines") given[name] = value.join("\n");
    else if (kind === "ids") given[name] = value.join(" ");
    else given[name] = kind === "json" ? asJson(value) : JSON.stringify(value);
  }
  const [format, value] = Object.entries(output ?? {}).find(([name, one]) => name in FORMATS && one !== null) ?? ["", ""];
  const text = format === "choices" ? value.join("\n") : typeof value === "string" ? value : JSON.stringify(value, null, 2);
  return {
    ...EMPTY_FORM,
    isChat: Boolean(messages),
    messages: messages ?? EMPTY_FORM.messages,
    prompt: prompt ?? "",
    models: [model, ""],
    params: given,
    format,
    formatText: format === "json_object" ? "" : text,
    tools: tools?.length ? JSON.stringify(tools, null, 2) : "",
    effort: input.reasoning_effort ?? "",
    templateValues: asJson(templateValues),
    priority: priority ? String(priority) : "",
    metadata: asJson(metadata),
  };
}

function Messages({ form, change }) {
  const put = (index, changed) => change({ messages: form.messages.map((message, at) => (at === index ? { ...message, ...changed } : message)) });
  const add = () => change({ messages: [...form.messages, { role: form.messages.at(-1)?.role === "user" ? "assistant" : "user", content: "" }] });
  return html`
    <div class="turns">
      ${form.messages.map((message, index) => html`
        <div class="turn" key=${index}>
          <select aria-label=${`Role of message ${index + 1}`} value=${message.role} onChange=${({ target }) => put(index, { role: target.value })}>${ROLES.map((role) => html`<option key=${role}>${role}</option>`)}</select>
          <textarea aria-label=${`Message ${index + 1}`} rows=${Math.min(12, 2 + message.content.split("\n").length)} value=${message.content} onInput=${({ target }) => put(index, { content: target.value })}></textarea>
          <button type="button" class="quiet" aria-label=${`Remove message ${index + 1}`} disabled=${form.messages.length === 1} onClick=${() => change({ messages: form.messages.filter((_, at) => at !== index) })}>✕</button>
        </div>`)}
      <button type="button" class="quiet" onClick=${add}>Add a message</button>
    </div>
  `;
}

function Parameter({ parameter, form, change, error }) {
  const { name, kind, min, max, step, hint, isOnByDefault = false } = parameter;
  const put = (value) => change({ params: { ...form.params, [name]: value } });
  if (kind === "switch") {
    return html`<label class="switch"><input type="checkbox" checked=${form.params[name] ?? isOnByDefault} onChange=${({ target }) => put(target.checked)} /><span><code>${name}</code>${hint && html` <small>${hint}</small>`}</span></label>`;
  }
  const common = { value: form.params[name] ?? "", onInput: ({ target }) => put(target.value), placeholder: "default" };
  const control = kind === "number" ? html`<input type="number" name=${name} inputmode="decimal" min=${min} max=${max} step=${step} ...${common} />` : html`<textarea rows="2" spellcheck="false" ...${common} placeholder=""></textarea>`;
  return html`<${Field} label=${name} hint=${hint} error=${error}>${control}<//>`;
}

function Format({ form, change, error }) {
  const format = FORMATS[form.format];
  const choose = (name) => change({ format: name, formatText: FORMATS[name]?.example ?? "" });
  return html`
    <${Field} label="The output must be">
      <select value=${form.format} onChange=${({ target }) => choose(target.value)}>
        <option value="">text</option>
        ${Object.entries(FORMATS).map(([name, { label }]) => html`<option key=${name} value=${name}>${label}</option>`)}
      </select>
    <//>
    ${format?.example && html`<${Field} label=${`structured_output.${form.format}`} error=${error}><textarea rows="6" spellcheck="false" class="mono" value=${form.formatText} onInput=${({ target }) => change({ formatText: target.value })}></textarea><//>`}
  `;
}

const TOOLS_HINT = '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]';

// `errors` is by the name of the field, ours and the API's alike.
export function PlaygroundForm({ form, change, errors }) {
  const text = (field, label, hint, rows) => html`<${Field} label=${label} hint=${hint} error=${errors[label]}><textarea rows=${rows} spellcheck="false" class="mono" value=${form[field]} onInput=${({ target }) => change({ [field]: target.value })}></textarea><//>`;
  const common = PARAMETERS.filter((parameter) => parameter.isCommon);
  const rest = PARAMETERS.filter((parameter) => !parameter.isCommon);
  const draw = (parameter) => html`<${Parameter} key=${parameter.name} parameter=${parameter} form=${form} change=${change} error=${errors[parameter.name]} />`;
  return html`
    <div class="segments" role="group" aria-label="Kind of input">
      <button type="button" aria-pressed=${form.isChat ? "true" : "false"} onClick=${() => change({ isChat: true })}>Chat</button>
      <button type="button" aria-pressed=${form.isChat ? "false" : "true"} onClick=${() => change({ isChat: false })}>Text to continue</button>
    </div>
    ${form.isChat ? html`<${Messages} form=${form} change=${change} />` : html`<${Field} label="Prompt" error=${errors.prompt}><textarea rows="6" value=${form.prompt} onInput=${({ target }) => change({ prompt: target.value })}></textarea><//>`}
    ${errors.messages && html`<p class="bad" role="alert">${errors.messages}</p>`}
    <div class="grid">${common.map(draw)}</div>
    <details><summary>All sampling parameters</summary><div class="grid">${rest.filter(({ kind }) => kind !== "switch").map(draw)}</div><div class="switches">${rest.filter(({ kind }) => kind === "switch").map(draw)}</div></details>
    <details open=${Boolean(form.format)}><summary>Format</summary><${Format} form=${form} change=${change} error=${errors.structured_output} /></details>
    ${form.isChat && html`
      <details open=${Boolean(form.tools)}><summary>Tools and thinking</summary>
        ${text("tools", "tools", TOOLS_HINT, 5)}
        <${Field} label="reasoning_effort"><select value=${form.effort} onChange=${({ target }) => change({ effort: target.value })}><option value="">the model's own</option>${EFFORTS.map((effort) => html`<option key=${effort}>${effort}</option>`)}</select><//>
        ${text("templateValues", "chat_template_kwargs", '{"enable_thinking": false}', 2)}
      </details>`}
    <details><summary>The job</summary>
      <${Field} label="priority" hint="−10 to 10, higher runs earlier" error=${errors.priority}><input type="number" name="priority" min="-10" max="10" step="1" value=${form.priority} onInput=${({ target }) => change({ priority: target.value })} /><//>
      ${text("metadata", "metadata", '{"user": "42"}', 2)}
    </details>
  `;
}
