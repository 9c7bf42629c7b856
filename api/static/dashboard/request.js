// A job's request: as it can be sent again, and as code that sends it.

import { isRaw } from "./json.js";

const DEFAULTS = { parallel_tool_calls: true, continue_final_message: false, kind: "generation", min_tokens: 0, min_p: 0, ignore_eos: false, presence_penalty: 0, frequency_penalty: 0, repetition_penalty: 1, n: 1 };

const isSaid = ([name, value]) => {
  if (value === null || value === undefined || DEFAULTS[name] === value) return false;
  return typeof value !== "object" || isRaw(value) || Object.keys(value).length > 0;
};

const said = (object) => Object.fromEntries(Object.entries(object).filter(isSaid));

// The body that makes the same job again, from the `input` of a job, without what is the default anyway.
export function bodyOf(input, model = input.model) {
  const { params, ...rest } = input;
  const body = said({ ...rest, model });
  const told = said(params ?? {});
  return Object.keys(told).length ? { ...body, params: told } : body;
}

const here = () => new URL(".", document.baseURI).href.replace(/\/$/, "");

const inShell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

const KEY_NOTE = "$CELERIAC_API_KEY";

export function asCurl(body, hasKey) {
  const key = hasKey ? ` -H "authorization: Bearer ${KEY_NOTE}"` : "";
  return `curl -s ${here()}/v1/jobs -H 'content-type: application/json'${key} \\\n  -d ${inShell(JSON.stringify(body, null, 2))}`;
}

// A JSON value as Python writes it.
function inPython(value, indent = "") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object" || isRaw(value)) return JSON.stringify(value);
  const deeper = `${indent}    `;
  const items = Array.isArray(value) ? value.map((item) => inPython(item, deeper)) : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${inPython(item, deeper)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const oneLine = `${open}${items.join(", ")}${close}`;
  if (oneLine.length < 80 && !oneLine.includes("\n")) return oneLine;
  return `${open}\n${items.map((item) => `${deeper}${item},\n`).join("")}${indent}${close}`;
}

const asArguments = (values) => Object.entries(values).map(([name, value]) => `    ${name}=${inPython(value, "    ")},\n`).join("");

export function asPython(body) {
  const { model, prompt, messages, params, prompt_token_ids: ids, inputs, ...options } = body;
  if (inputs || ids) return "# The client library takes prompts and messages; send this request with curl or another HTTP client.";
  const values = asArguments({ model, ...params, ...options });
  return `from celeriac.client import Client\n\nwith Client(${JSON.stringify(here())}) as client:  # the key: CELERIAC_API_KEY\n    job = client.submit(\n        ${inPython(messages ?? prompt, "        ")},\n${values.replaceAll(/^/gm, "    ").trimEnd()}\n    )\n    for event in client.stream(job.id):\n        print(event.text, end="", flush=True)\n`;
}

const OPENAI_OWN = new Set(["max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "n", "stop", "logprobs"]);

export function asOpenAI(body) {
  const { model, prompt, messages, params = {}, tools, inputs, prompt_token_ids: ids, priority, ...rest } = body;
  if (inputs || ids) return "# Embeddings: client.embeddings.create(model=…, input=[…]); token ids: client.completions.create(prompt=[…]).";
  const own = {};
  const extra = { ...rest };
  for (const [name, value] of Object.entries(params)) (OPENAI_OWN.has(name) ? own : extra)[name] = value;
  if (messages && "logprobs" in own) Object.assign(own, { logprobs: true, top_logprobs: params.logprobs });
  const call = messages ? "chat.completions" : "completions";
  const functions = tools?.map((tool) => ({ type: "function", function: tool }));
  const values = said({ model, messages, prompt, ...own, tools: functions, extra_body: extra });
  const text = messages ? "chunk.choices[0].delta.content or \"\"" : "chunk.choices[0].text";
  return `import openai\n\nclient = openai.OpenAI(base_url=${JSON.stringify(`${here()}/v1`)}, api_key="...")\nstream = client.${call}.create(\n${asArguments(values)}    stream=True,\n)\nfor chunk in stream:\n    print(${text}, end="", flush=True)\n`;
}
