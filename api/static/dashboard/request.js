// A job's request: as it can be sent again, and as code that sends it.

import { isRaw, visible } from "./json.js";

const DEFAULTS = { parallel_tool_calls: true, continue_final_message: false, kind: "generation", priority: 0, min_tokens: 0, min_p: 0, ignore_eos: false, presence_penalty: 0, frequency_penalty: 0, repetition_penalty: 1, n: 1 };

const isSaid = ([name, value]) => {
  if (value === null || value === undefined || DEFAULTS[name] === value) return false;
  return typeof value !== "object" || isRaw(value) || Object.keys(value).length > 0;
};

const said = (object) => Object.fromEntries(Object.entries(object).filter(isSaid));

// The body that makes the same job again, from the `input` of a job, without what is the default anyway.
export function bodyOf(input) {
  const { params, ...rest } = input;
  const body = said(rest);
  const told = said(params ?? {});
  if (told.structured_output) told.structured_output = said(told.structured_output);
  return Object.keys(told).length ? { ...body, params: told } : body;
}

const MIN_PRIORITY = -10; // that may be asked for: lines of batches begin lower

// What a job was asked, with its options: all that `bodyOf` takes.
export const askedOf = ({ input, metadata, priority, start_timeout, run_timeout }) => ({ ...input, metadata, priority: priority < MIN_PRIORITY ? null : priority, start_timeout, run_timeout });

const here = () => new URL(".", document.baseURI).href.replace(/\/$/, "");

const inShell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

const KEY_NOTE = "$CELERIAC_API_KEY";

const MAX_ARGUMENT = 100_000; // characters: Linux takes no argument of more than 128 KiB

export function asCurl(body, hasKey) {
  const key = hasKey ? ` -H "authorization: Bearer ${KEY_NOTE}"` : "";
  const text = visible(body, 2);
  const data = new TextEncoder().encode(text).length > MAX_ARGUMENT ? `--data-binary @- <<'END'\n${text}\nEND` : `-d ${inShell(text)}`;
  return `curl -s ${here()}/v1/jobs -H 'content-type: application/json'${key} \\\n  ${data}`;
}

// A JSON value as Python writes it.
function inPython(value, indent = "") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object" || isRaw(value)) return visible(value);
  const deeper = `${indent}    `;
  const items = Array.isArray(value) ? value.map((item) => inPython(item, deeper)) : Object.entries(value).map(([name, item]) => `${visible(name)}: ${inPython(item, deeper)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const oneLine = `${open}${items.join(", ")}${close}`;
  if (oneLine.length < 80 && !oneLine.includes("\n")) return oneLine;
  return `${open}\n${items.map((item) => `${deeper}${item},\n`).join("")}${indent}${close}`;
}

const asArguments = (values) => Object.entries(values).map(([name, value]) => `    ${name}=${inPython(value, "    ")},\n`).join("");

const NO_SCORES = "# Scores are asked of POST /v1/score and /v1/rerank; or send this request with curl.";

const PRINT_TEXT = '    for event in client.stream(job.id):\n        print(event.text, end="", flush=True)\n';
const PRINT_VECTORS = "    for vector in client.result(job.id).embeddings:\n        print(len(vector), list(vector[:4]))\n";

export function asPython(body) {
  const { kind, model, prompt, messages, params, ...options } = body;
  if (options.queries) return NO_SCORES;
  const first = messages ?? prompt;
  const values = asArguments({ model, ...params, ...options }).replaceAll(/^/gm, "    ").trimEnd();
  const asked = first === undefined ? "" : `        ${inPython(first, "        ")},\n`;
  return `from celeriac.client import Client\n\nwith Client(${JSON.stringify(here())}) as client:  # the key: CELERIAC_API_KEY\n    job = client.submit(\n${asked}${values}\n    )\n${options.inputs ? PRINT_VECTORS : PRINT_TEXT}`;
}

const OPENAI_OWN = new Set(["max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "n", "stop", "logprobs"]);

const asTheirs = ({ tool_calls: calls, ...message }) => (calls ? { ...message, tool_calls: calls.map(({ id, ...named }) => ({ id, type: "function", function: named })) } : message);

// The form of the output, in OpenAI's fields: calls alone are required ones, and beside another form they are allowed.
function formOf({ calls, ...form }) {
  if (Object.keys(form).length) return { structured_output: form };
  if (!calls) return {};
  const [only, ...others] = calls.tools;
  return { tool_choice: calls.is_single && !others.length ? { type: "function", function: { name: only.name } } : "required" };
}

const ofClient = (call, values, rest) => `import openai\n\nclient = openai.OpenAI(base_url=${JSON.stringify(`${here()}/v1`)}, api_key="...")\n${call}(\n${asArguments(said(values))}${rest}`;

export function asOpenAI(body) {
  const { kind, model, prompt, messages, params = {}, tools, inputs, queries, prompt_token_ids: ids, priority, ...rest } = body;
  if (queries) return NO_SCORES;
  if (inputs) return ofClient("answer = client.embeddings.create", { model, input: inputs, dimensions: rest.dimensions, extra_body: said({ ...rest, dimensions: null }) }, ")\nfor item in answer.data:\n    print(len(item.embedding), item.embedding[:4])\n");
  if (messages && params.best_of) return "# OpenAI's chat has no best_of; send this request with the client library or curl.";
  const { structured_output: output, ...plain } = params;
  const own = {};
  const extra = { ...rest };
  for (const [name, value] of Object.entries(plain)) (OPENAI_OWN.has(name) ? own : extra)[name] = value;
  const { tool_choice, ...form } = formOf(said(output ?? {}));
  if (messages && "logprobs" in own) Object.assign(own, { logprobs: true, top_logprobs: params.logprobs });
  const call = messages ? "chat.completions.create" : "completions.create";
  const functions = tools?.map((tool) => ({ type: "function", function: tool }));
  const values = { model, messages: messages?.map(asTheirs), prompt: prompt ?? ids, ...own, tools: functions, tool_choice, extra_body: { ...extra, ...form } };
  // What does not come as one text is read at its end.
  if (params.n > 1 || params.best_of > 1 || "prompt_logprobs" in params || tools) {
    const choice = messages ? 'choice.message.content or choice.message.tool_calls' : "choice.text";
    return ofClient(`answer = client.${call}`, values, `)\nfor choice in answer.choices:\n    print(${choice})\n`);
  }
  const text = messages ? 'chunk.choices[0].delta.content or ""' : "chunk.choices[0].text";
  return ofClient(`stream = client.${call}`, values, `    stream=True,\n)\nfor chunk in stream:\n    print(${text}, end="", flush=True)\n`);
}
