// What people do with Vercel's AI SDK (three of its providers) and with Anthropic's SDK for TypeScript.

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { run } from "./report.mjs";

const MODEL = "test-model"; // its jobs run
const BY_HAND = "by-hand"; // it always calls the tool
const baseURL = process.env.OPENAI_BASE_URL;
const apiKey = process.env.OPENAI_API_KEY;
const compatible = createOpenAICompatible({ name: "celeriac", baseURL, apiKey, includeUsage: true });
const openai = createOpenAI({ baseURL, apiKey });
const messages = createAnthropic({ baseURL, apiKey });
const anthropic = new Anthropic({ baseURL: baseURL.replace("/v1", ""), apiKey, maxRetries: 0 });
const asked = { prompt: "Hi", maxOutputTokens: 8, maxRetries: 0 };
const add = tool({ inputSchema: z.object({ a: z.number() }), execute: async ({ a }) => a + 1 });

async function text(model) {
  const whole = await generateText({ model, ...asked });
  assert.ok(whole.text.length > 0);
  assert.deepEqual([whole.finishReason, whole.usage.outputTokens], ["length", 8]);
  const streamed = streamText({ model, ...asked });
  const parts = [];
  for await (const part of streamed.textStream) parts.push(part);
  assert.ok(parts.length > 1);
  assert.equal(await streamed.finishReason, "length");
  assert.equal((await streamed.usage).outputTokens, 8);
}

/** The SDK's own messages go back with a second question; by @ai-sdk/openai, as references to stored items. */
async function turns(model) {
  const messages = [{ role: "user", content: "Hi" }];
  const first = await generateText({ model, messages, maxOutputTokens: 8, maxRetries: 0 });
  messages.push(...first.response.messages, { role: "user", content: "More" });
  const second = await generateText({ model, messages, maxOutputTokens: 8, maxRetries: 0 });
  assert.ok(second.usage.inputTokens > first.usage.inputTokens + 8);
  const { steps } = await generateText({ model: model.byHand, prompt: "Hi", tools: { add }, stopWhen: stepCountIs(2), maxRetries: 0 });
  assert.deepEqual(steps.map((step) => step.toolResults.length), [1, 1]);
}

const turnsOf = (provider) => () => turns(Object.assign(provider(MODEL), { byHand: provider(BY_HAND) }));

async function toolCall(model) {
  const whole = await generateText({ model, prompt: "Hi", tools: { add }, stopWhen: stepCountIs(1), maxRetries: 0 });
  assert.deepEqual(whole.toolCalls.map((call) => [call.toolName, call.input]), [["add", { a: 1 }]]);
  assert.deepEqual(whole.toolResults.map((result) => result.output), [2]);
  const streamed = streamText({ model, prompt: "Hi", tools: { add }, stopWhen: stepCountIs(1), maxRetries: 0 });
  await streamed.consumeStream();
  assert.deepEqual((await streamed.toolCalls).map((call) => [call.toolName, call.input]), [["add", { a: 1 }]]);
}

await run({
  aiSdkCompatible: () => text(compatible(MODEL)),
  aiSdkCompatibleTool: () => toolCall(compatible(BY_HAND)),
  aiSdkOpenaiChat: () => text(openai.chat(MODEL)),
  aiSdkOpenaiResponses: () => text(openai.responses(MODEL)),
  aiSdkOpenaiResponsesTool: () => toolCall(openai.responses(BY_HAND)),
  aiSdkAnthropic: () => text(messages(MODEL)),
  aiSdkAnthropicTool: () => toolCall(messages(BY_HAND)),
  aiSdkCompatibleTurns: turnsOf(compatible),
  aiSdkOpenaiChatTurns: turnsOf(openai.chat),
  aiSdkOpenaiResponsesTurns: turnsOf(openai.responses),
  aiSdkAnthropicTurns: turnsOf(messages),
  async aiSdkEmbeddings() {
    const { embeddings } = await embedMany({ model: compatible.textEmbeddingModel(MODEL), values: ["One", "Two"] });
    assert.equal(embeddings.length, 2);
    assert.ok(embeddings[0].length > 0);
  },
  async anthropicWhole() {
    const body = { model: MODEL, max_tokens: 8, messages: [{ role: "user", content: "Hi" }] };
    const whole = await anthropic.messages.create(body);
    assert.deepEqual([whole.stop_reason, whole.usage.output_tokens], ["max_tokens", 8]);
    const final = await anthropic.messages.stream(body).finalMessage();
    assert.ok(final.content[0].text.length > 0);
    assert.equal(final.stop_reason, "max_tokens");
    assert.ok((await anthropic.messages.countTokens({ model: MODEL, messages: body.messages })).input_tokens > 0);
  },
  async anthropicTool() {
    const tools = [{ name: "add", input_schema: { type: "object", properties: { a: { type: "integer" } } } }];
    const body = { model: BY_HAND, max_tokens: 30, messages: [{ role: "user", content: "Hi" }], tools };
    const final = await anthropic.messages.stream(body).finalMessage();
    assert.deepEqual(final.content.map((block) => [block.type, block.name, block.input]), [["tool_use", "add", { a: 1 }]]);
    assert.equal(final.stop_reason, "tool_use");
  },
});
