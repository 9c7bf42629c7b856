// What pages do: EventSource with the recipe of docs/recipes.md (recipe.mjs beside this file), and a client of the
// Durable Streams protocol. The token is all that they have.

import assert from "node:assert/strict";
import { stream } from "@durable-streams/client";
import { EventSource } from "eventsource";
import { run } from "./report.mjs";

globalThis.EventSource = EventSource;
const { follow } = await import("./recipe.mjs");
const server = process.env.OPENAI_BASE_URL.replace("/v1", "");

async function api(method, path, body) {
  const headers = { authorization: `Bearer ${process.env.OPENAI_API_KEY}`, "content-type": "application/json" };
  const answer = await fetch(`${server}${path}`, { method, headers, body: body && JSON.stringify(body) });
  assert.ok(answer.ok, await answer.clone().text());
  return answer.json();
}

async function begin(max_tokens = 100) {
  const job = await api("POST", "/v1/jobs", { model: "test-model", prompt: "Hi", params: { max_tokens } });
  return { id: job.id, token: await api("POST", `/v1/jobs/${job.id}/stream_token`) };
}

const textOf = async (id) => (await api("GET", `/v1/jobs/${id}?wait=60`)).output.text;

// Reads until `enough(saved)` or the end; resolves to the last status.
const read = (token, saved, enough = () => false) =>
  new Promise((resolve) => {
    const source = follow(server, token, saved, (_, status) => {
      if (status === "running" && !enough(saved)) return;
      source.close();
      resolve(status);
    });
  });

await run({
  async eventSourceWhole() {
    const { id, token } = await begin();
    const saved = { text: "", cursor: "" };
    assert.equal(await read(token, saved), "completed");
    assert.equal(saved.text, await textOf(id));
  },
  async eventSourceClosedAndOpened() {
    const { id, token } = await begin(300);
    let saved = { text: "", cursor: "" };
    await read(token, saved, ({ text }) => text.length > 3);
    saved = JSON.parse(JSON.stringify(saved)); // the tab was closed; localStorage has it
    assert.equal(await read(token, saved), "completed");
    assert.equal(saved.text, await textOf(id));
  },
  async eventSourceWithAForeignToken() {
    const { token } = await begin(1);
    const other = await begin(1);
    assert.equal(await read({ ...token, job_id: other.id }, { text: "", cursor: "" }), "refused");
  },
  async durableStreamSse() {
    const { id, token } = await begin();
    const response = await stream({ url: `${server}/v1/jobs/${id}/stream?token=${token.token}`, offset: "-1", live: "sse" });
    const messages = [];
    for await (const message of response.jsonStream()) messages.push(message);
    assert.equal(messages.at(-1).event, "job.completed");
    const deltas = messages.filter(({ event }) => event === "output.delta").map(({ data }) => data.text);
    assert.equal(deltas.join(""), await textOf(id));
  },
  async durableStreamLongPoll() {
    const { id, token } = await begin();
    const headers = { accept: "text/plain" };
    const url = `${server}/v1/jobs/${id}/stream?token=${token.token}`;
    const response = await stream({ url, headers, offset: "-1", live: "long-poll" });
    let text = "";
    for await (const part of response.textStream()) text += part;
    assert.equal(text, await textOf(id));
  },
  async durableStreamCatchUpInParts() {
    const { id, token } = await begin();
    const text = await textOf(id);
    const url = `${server}/v1/jobs/${id}/stream?token=${token.token}`;
    const headers = { accept: "text/plain" };
    const whole = await stream({ url, headers, live: false });
    assert.equal(await whole.text(), text);
    assert.ok(whole.streamClosed);
    const rest = await stream({ url, headers, offset: "0000000000000001", live: false });
    const first = (await (await fetch(`${url}&offset=-1`)).json())[0].data.text;
    assert.equal(first + (await rest.text()), text);
  },
});
