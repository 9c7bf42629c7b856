// What people do with openai-node. Prints one JSON object with the fate of each case.

import assert from "node:assert/strict";
import OpenAI from "openai";

const MODEL = "test-model"; // its jobs run
const BY_HAND = "by-hand"; // it always calls the tool
const messages = [{ role: "user", content: "Hi" }];
const tools = [
  { type: "function", function: { name: "add", parameters: { type: "object", properties: { a: { type: "integer" } } } } },
];
const client = new OpenAI({ maxRetries: 0 }); // the URL and the key come from the environment

const cases = {
  async chatWhole() {
    const answer = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 8 });
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 8);
    assert.ok(answer._request_id.startsWith("req_"));
  },
  async chatStream() {
    const body = { model: MODEL, messages, max_tokens: 8, seed: 3 };
    const stream = await client.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    const whole = await client.chat.completions.create(body);
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, 8);
  },
  async chatStreamHelper() {
    const stream = client.chat.completions.stream({ model: MODEL, messages, max_tokens: 5 });
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].finish_reason, "length");
  },
  async toolCallStreamed() {
    const stream = client.chat.completions.stream({ model: BY_HAND, messages, tools, max_tokens: 30 });
    const final = await stream.finalChatCompletion();
    const [call] = final.choices[0].message.tool_calls;
    assert.equal(call.function.name, "add");
    assert.deepEqual(JSON.parse(call.function.arguments), { a: 1 });
    assert.equal(final.choices[0].finish_reason, "tool_calls");
  },
  async completionsStream() {
    const stream = await client.completions.create({ model: MODEL, prompt: "One", max_tokens: 4, stream: true });
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0].text;
    assert.ok(text.length > 0);
  },
  async abort() {
    const stream = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 1000, stream: true });
    let chunks = 0;
    for await (const _ of stream) {
      if (++chunks === 2) stream.controller.abort();
    }
    assert.ok(chunks < 1000);
  },
  async aTimeoutIsRetriedAndAttached() {
    // The first try gives up while the job runs; the next ones carry x-stainless-retry-count and wait for the same job.
    const body = { model: MODEL, messages, max_tokens: 100 };
    const { data, response } = await client.chat.completions
      .create(body, { timeout: 350, maxRetries: 8 })
      .withResponse();
    assert.equal(response.headers.get("x-retry-attached"), "true");
    assert.equal(data.usage.completion_tokens, 100);
  },
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.ok(ids.includes(MODEL));
    assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
  },
  async badValue() {
    const asked = client.chat.completions.create({ model: MODEL, messages, temperature: 9 });
    await assert.rejects(asked, (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.deepEqual([error.status, error.code, error.param], [400, "invalid_value", "temperature"]);
      return true;
    });
  },
  async unknownModel() {
    const asked = client.chat.completions.create({ model: "none", messages });
    await assert.rejects(asked, (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
  },
  async wrongKey() {
    const stranger = new OpenAI({ maxRetries: 0, apiKey: "sk_wrong" });
    await assert.rejects(stranger.models.list(), (error) => error instanceof OpenAI.AuthenticationError);
  },
};

const fates = {};
for (const [name, run] of Object.entries(cases)) {
  try {
    await run();
    fates[name] = "ok";
  } catch (error) {
    fates[name] = String(error.stack ?? error);
  }
}
process.stdout.write(JSON.stringify({ cases: fates }));
