// JSON whose large integers stay exact: seeds have 64 bits, more than JavaScript's numbers can tell apart. An integer that
// would be rounded is kept as the text that it was, by JSON.rawJSON, where the browser has that (since 2023 to 2025).

const raw = (text, rounded) => (JSON.rawJSON ? JSON.rawJSON(text) : rounded);

const isRounded = (value) => Number.isInteger(value) && !Number.isSafeInteger(value);

export const isRaw = (value) => JSON.isRawJSON?.(value) ?? false;

export const parse = (text) => JSON.parse(text, (_, value, context) => (isRounded(value) && /^-?\d+$/.test(context?.source ?? "") ? raw(context.source, value) : value));

// The number that a person has written. Throws an Error that says what is wrong with it.
export function numberOf(text) {
  const value = Number(text);
  if (Number.isNaN(value)) throw new Error(`it is ${text}; write a number`);
  return isRounded(value) && /^-?\d+$/.test(text.trim()) ? raw(text.trim(), value) : value;
}

const UNSEEN = /[\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

// JSON to be read: characters that are not seen, or turn the direction of what follows, are written as \uNNNN.
export const visible = (value, indent) => JSON.stringify(value, null, indent).replace(UNSEEN, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
