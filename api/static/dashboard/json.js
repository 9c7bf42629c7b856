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
