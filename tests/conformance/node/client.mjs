// What people do with openai-node. Prints one JSON object with the fate of each case.

import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI, { toFile } from "openai";

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
  async responseWhole() {
    const answer = await client.responses.create({ model: MODEL, input: "Hi", max_output_tokens: 6 });
    assert.ok(answer.output_text.length > 0);
    assert.deepEqual([answer.status, answer.usage.output_tokens], ["incomplete", 6]);
    assert.equal((await client.responses.retrieve(answer.id)).output_text, answer.output_text);
  },
  async responseStream() {
    const events = await all(await client.responses.create({ model: MODEL, input: "Hi", max_output_tokens: 6, stream: true }));
    assert.deepEqual(events.map((event) => event.sequence_number), [...events.keys()]);
    const deltas = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta);
    assert.equal(events.at(-1).type, "response.incomplete");
    assert.equal(deltas.join(""), events.at(-1).response.output[0].content[0].text);
  },
  async responseInTheBackgroundAndResumed() {
    const { id, status } = await client.responses.create({ model: MODEL, input: "Hi", max_output_tokens: 40, background: true });
    assert.ok(["queued", "in_progress"].includes(status));
    const whole = await all(await client.responses.retrieve(id, { stream: true }));
    const resumed = await all(await client.responses.retrieve(id, { stream: true, starting_after: 7 }));
    assert.deepEqual(resumed, whole.slice(8));
    assert.ok(resumed.length > 2);
  },
  async embeddings() {
    // Without a format the SDK asks for base64 and decodes it.
    const answer = await client.embeddings.create({ model: MODEL, input: ["One", "Two"], dimensions: 4 });
    const plain = await client.embeddings.create({ model: MODEL, input: "One", dimensions: 4, encoding_format: "float" });
    assert.deepEqual(answer.data.map((entry) => entry.index), [0, 1]);
    plain.data[0].embedding.forEach((number, place) => assert.ok(Math.abs(number - answer.data[0].embedding[place]) < 1e-6));
  },
  async filesAndABatch() {
    const line = { method: "POST", url: "/v1/chat/completions", body: { model: MODEL, messages, max_tokens: 4 } };
    const content = [0, 1, 2].map((number) => JSON.stringify({ custom_id: `line-${number}`, ...line })).join("\n");
    const file = await client.files.create({ file: await toFile(Buffer.from(content), "in.jsonl"), purpose: "batch" });
    assert.equal(await (await client.files.content(file.id)).text(), content);
    const asked = { input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" };
    let batch = await client.batches.create(asked);
    while (["validating", "in_progress", "finalizing"].includes(batch.status)) {
      await sleep(50);
      batch = await client.batches.retrieve(batch.id);
    }
    assert.deepEqual([batch.status, batch.request_counts.completed], ["completed", 3]);
    const answers = (await (await client.files.content(batch.output_file_id)).text()).trim().split("\n").map((one) => JSON.parse(one));
    assert.deepEqual(answers.map((one) => one.custom_id).sort(), ["line-0", "line-1", "line-2"]);
  },
  async webhook() {
    // What arrives is unwrapped by the SDK, and refused under another secret.
    const server = createServer().listen(0, "127.0.0.1");
    const received = once(server, "request");
    await once(server, "listening");
    try {
      const url = `http://localhost:${server.address().port}/hook`;
      const body = { name: "program", url, event_types: ["response.incomplete"] };
      const endpoint = await client.post("/webhook_endpoints", { body });
      const answer = await client.responses.create({ model: MODEL, input: "Hi", max_output_tokens: 2 });
      const [request, reply] = await received;
      const text = Buffer.concat(await request.toArray()).toString();
      reply.end();
      const event = await client.webhooks.unwrap(text, request.headers, endpoint.signing_secret);
      assert.deepEqual([event.type, event.data.id], ["response.incomplete", answer.id]);
      await assert.rejects(client.webhooks.unwrap(text, request.headers, "whsec_" + btoa("another")));
      await client.delete(`/webhook_endpoints/${endpoint.id}`);
    } finally {
      server.close();
      server.closeAllConnections();
    }
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

async function all(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

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
