// The sampling parameters of the playground's form: `params` of POST /v1/jobs, all of them, and how their text is read.

import { numberOf, parse } from "./json.js";

const list = (text) => text.split("\n").filter(Boolean);

const ids = (text) =>
  text
    .split(/[\s,]+/)
    .filter(Boolean)
    .map(numberOf);

export function json(text) {
  try {
    return parse(text);
  } catch (error) {
    throw new Error(`it is not JSON: ${error.message}`);
  }
}

// kind: number (with bounds), lines (one item a line), ids (numbers), json, switch.
export const PARAMETERS = [
  { name: "temperature", kind: "number", min: 0, max: 2, step: 0.05, hint: "0 is greedy", isCommon: true },
  { name: "top_p", kind: "number", min: 0, max: 1, step: 0.01, hint: "of the probability", isCommon: true },
  { name: "max_tokens", kind: "number", min: -1, step: 1, hint: "−1: what fits", isCommon: true },
  { name: "seed", kind: "number", step: 1, hint: "the same text again", isCommon: true },
  { name: "top_k", kind: "number", min: -1, step: 1, hint: "0 is off" },
  { name: "min_p", kind: "number", min: 0, max: 1, step: 0.01, hint: "of the likeliest" },
  { name: "min_tokens", kind: "number", min: 0, step: 1 },
  { name: "n", kind: "number", min: 1, max: 16, step: 1, hint: "choices" },
  { name: "best_of", kind: "number", min: 1, max: 16, step: 1, hint: "candidates" },
  { name: "presence_penalty", kind: "number", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", kind: "number", min: -2, max: 2, step: 0.1 },
  { name: "repetition_penalty", kind: "number", min: 0.01, max: 10, step: 0.05, hint: "1 is off" },
  { name: "logprobs", kind: "number", min: 0, max: 20, step: 1, hint: "alternatives" },
  { name: "prompt_logprobs", kind: "number", min: 0, max: 20, step: 1, hint: "alternatives" },
  { name: "stop", kind: "lines", hint: "one string a line" },
  { name: "bad_words", kind: "lines", hint: "one a line" },
  { name: "stop_token_ids", kind: "ids", hint: "numbers" },
  { name: "bad_token_ids", kind: "ids", hint: "numbers" },
  { name: "allowed_token_ids", kind: "ids", hint: "numbers; no others are drawn" },
  { name: "logit_bias", kind: "json", hint: '{"42": -5}' },
  { name: "ignore_eos", kind: "switch", hint: "write on to max_tokens" },
  { name: "include_stop_str_in_output", kind: "switch" },
  { name: "skip_special_tokens", kind: "switch", isOnByDefault: true },
];

// What the output must be: the fields of `structured_output`.
export const FORMATS = {
  json_schema: { label: "JSON of a schema", read: json, example: '{\n  "type": "object",\n  "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},\n  "required": ["name", "age"]\n}' },
  json_object: { label: "any JSON object", read: () => true },
  regex: { label: "a regular expression", read: (text) => text, example: "(yes|no), because .{10,80}\\." },
  choices: { label: "one of several texts", read: list, example: "yes\nno" },
  lark: { label: "a Lark grammar", read: (text) => text, example: 'start: "yes" | "no"' },
};

const READERS = { number: numberOf, lines: list, ids, json };

// {params, errors}: what `form.params` says, without what was left empty, and what cannot be read, by its name.
export function readParameters(form) {
  const params = {};
  const errors = {};
  for (const { name, kind, isOnByDefault = false } of PARAMETERS) {
    const given = form.params[name];
    if (kind === "switch") {
      if (given !== undefined && given !== isOnByDefault) params[name] = given;
    } else if (given?.trim()) {
      try {
        params[name] = READERS[kind](given);
      } catch (error) {
        errors[name] = error.message;
      }
    }
  }
  if (form.format) {
    try {
      params.structured_output = { [form.format]: FORMATS[form.format].read(form.formatText ?? "") };
    } catch (error) {
      errors.structured_output = error.message;
    }
  }
  return { params, errors };
}
