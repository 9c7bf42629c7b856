// useChat without React: the Chat of Vercel's AI SDK, over its own transport, against the app of docs/recipes.md.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import { AbstractChat, DefaultChatTransport } from "ai";
import { run } from "./report.mjs";

class State {
  // What React's hook keeps.
  status = "ready";
  error = undefined;
  messages = [];
  pushMessage = (message) => (this.messages = [...this.messages, message]);
  popMessage = () => (this.messages = this.messages.slice(0, -1));
  replaceMessage = (index, message) => (this.messages = this.messages.with(index, structuredClone(message)));
  snapshot = (value) => structuredClone(value);
}

class Chat extends AbstractChat {
  constructor(id, messages = []) {
    const state = new State();
    state.messages = messages;
    super({ id, state, transport: new DefaultChatTransport({ api: `${process.env.CHAT_URL}/api/chat` }) });
  }
  get text() {
    const last = this.messages.at(-1);
    return last?.role === "assistant" ? last.parts.filter(({ type }) => type === "text").map(({ text }) => text).join("") : "";
  }
}

async function until(condition) {
  while (!condition()) await sleep(5);
}

const job = async (id) => {
  const headers = { authorization: `Bearer ${process.env.OPENAI_API_KEY}` };
  return (await fetch(`${process.env.OPENAI_BASE_URL}/jobs/${id}?wait=60`, { headers })).json();
};

await run({
  async aWholeAnswer() {
    const chat = new Chat("whole");
    await chat.sendMessage({ text: "Hi" });
    assert.deepEqual([chat.status, chat.error], ["ready", undefined]);
    assert.equal(chat.text, (await job(chat.messages.at(-1).id)).output.text);
  },
  async aClosedTabGoesOn() {
    const closed = new Chat("closed");
    const sending = closed.sendMessage({ text: "Hi" });
    await until(() => closed.text.length > 3);
    await closed.stop(); // reads no further; the job goes on
    await sending;
    const opened = new Chat("closed", [{ id: "u1", role: "user", parts: [{ type: "text", text: "Hi" }] }]);
    await opened.resumeStream();
    const whole = await job(closed.messages.at(-1).id);
    assert.equal(whole.status, "completed");
    if (opened.messages.length > 1) assert.equal(opened.text, whole.output.text); // else it had ended before: a 204
  },
  async nothingToResume() {
    const chat = new Chat("never");
    await chat.resumeStream();
    assert.deepEqual([chat.status, chat.messages], ["ready", []]);
  },
  async stopIsARequest() {
    const chat = new Chat("stopped");
    const sending = chat.sendMessage({ text: "Hi" });
    await until(() => chat.text.length > 0);
    await fetch(`${process.env.CHAT_URL}/api/chat/stopped/stop`, { method: "POST" });
    await sending;
    const ended = await job(chat.messages.at(-1).id);
    assert.ok(["cancelled", "completed"].includes(ended.status));
    assert.equal(chat.text, ended.output.text);
  },
});
