// The official `openai` client for Node, unchanged, against a running `gyrostat serve`.
//
//     npm install openai && node openai_client.mjs http://127.0.0.1:8088 [STRICT ORPHAN]
import assert from "node:assert/strict";
import OpenAI from "openai";

const url = process.argv[2];
// Retries would hide a failure.
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0, timeout: 300_000 });
const messages = [{ role: "user", content: "Name three rivers of Europe." }];
const model = (await client.models.list()).data[0].id;
const ask = (more) => client.chat.completions.create({ model, messages, max_tokens: 12, ...more });
const step = (text) => console.log(`ok  ${text}`);

const answer = await ask({});
assert.equal(answer.object, "chat.completion");
assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
step("chat");

let text = "";
let usage;
for await (const chunk of await ask({ seed: 3, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const whole = await ask({ seed: 3 });
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
step("stream, with usage, and a seed twice");

const { content } = (await ask({ logprobs: true, top_logprobs: 3 })).choices[0].logprobs;
assert.ok(content.every((token) => token.logprob <= 0 && token.top_logprobs.length === 3));
step("logprobs");

const three = await ask({ n: 3, seed: 1 });
assert.deepEqual(three.choices.map((choice) => choice.index), [0, 1, 2]);
step("n = 3");

const long = (await ask({ max_tokens: 40, temperature: 0 })).choices[0].message.content;
const stop = long.slice(4, 6);
const stopped = (await ask({ max_tokens: 40, temperature: 0, stop })).choices[0];
assert.equal(stopped.finish_reason, "stop");
assert.equal(stopped.message.content, long.slice(0, long.indexOf(stop)));
step("stop");

const schema = { type: "object", additionalProperties: false, required: ["a"], properties: { a: { type: "boolean" } } };
const form = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
const formed = (await ask({ max_tokens: 300, seed: 2, response_format: form })).choices[0];
if (formed.finish_reason === "stop") assert.equal(typeof JSON.parse(formed.message.content).a, "boolean");
else assert.match(formed.message.content, /^\s*\{/);
step(`json_schema: ${formed.finish_reason}`);

const stream = await ask({ max_tokens: 400, stream: true, logit_bias: { 2: -100 } });
for await (const _ of stream) break;
const cancelled = async () => /outcome="cancelled".* [1-9]/.test(await (await fetch(`${url}/metrics`)).text());
for (let tries = 0; !(await cancelled()); tries += 1) {
  assert.ok(tries < 200, "the cancelled stream was never counted");
  await new Promise((wake) => setTimeout(wake, 50));
}
step("cancellation");

const refused = async (kind, asked, code) => {
  const error = await asked.then(() => assert.fail("nothing was refused"), (error) => error);
  assert.equal(error.constructor, kind, `${error}`);
  assert.ok(error.error.message && error.type, `${error}`);
  if (code) assert.equal(error.code, code);
  return error;
};
await refused(OpenAI.BadRequestError, ask({ temperature: 9 }), "invalid_value");
await refused(OpenAI.BadRequestError, ask({ max_tokens: 1_000_000 }), "context_length_exceeded");
await refused(OpenAI.BadRequestError, ask({ tools: [{ type: "function", function: { name: "f" } }] }));
await refused(OpenAI.NotFoundError, ask({ model: "no-such-model" }), "model_not_found");
await assert.rejects(client.get("/nowhere"), OpenAI.NotFoundError);
step("errors");

// A server that wants keys and lets one request wait, and one whose upstream is not there.
const [strict, orphan] = process.argv.slice(3);
if (strict && orphan) {
  const client_of = (url, apiKey, more) => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 60_000, ...more });
  const [every, chatOnly] = [client_of(strict, "every"), client_of(strict, "chat-only")];
  const put = (who, more) => who.chat.completions.create({ model, messages, max_tokens: 2, ...more });
  await refused(OpenAI.AuthenticationError, put(client_of(strict, "wrong")), "invalid_api_key");
  await refused(OpenAI.PermissionDeniedError, chatOnly.get("/updates"), "insufficient_scope");
  const completion_id = (await put(every)).id;
  const rating = { completion_id, kind: "rating", value: 6 };
  assert.equal((await refused(OpenAI.UnprocessableEntityError, every.post("/feedback", { body: rating }))).param, "value");
  await every.post("/updates", { body: { recipe: "sft" } });
  const again = async () => { for (let nth = 0; nth < 2; nth += 1) await every.post("/updates", { body: { recipe: "sft" } }); };
  await refused(OpenAI.ConflictError, again(), "conflict");
  const large = put(every, { messages: [{ role: "user", content: "x".repeat(2_000_000) }] });
  assert.equal((await refused(OpenAI.APIError, large, "request_too_large")).status, 413);
  const never = { max_tokens: 400, logit_bias: { 2: -100 } };
  const crowd = await Promise.allSettled(Array.from({ length: 6 }, () => put(every, never)));
  const limited = crowd.filter((answer) => answer.status === "rejected").map((answer) => answer.reason);
  assert.ok(limited.length > 0 && limited.every((error) => error instanceof OpenAI.RateLimitError));
  assert.ok(limited.every((error) => Number(error.headers.get("retry-after")) >= 1));
  await refused(OpenAI.InternalServerError, put(client_of(orphan, "unused")), "upstream_unreachable");
  await assert.rejects(put(client_of(strict, "every", { timeout: 1 })), OpenAI.APIConnectionTimeoutError);
  await assert.rejects(put(client_of("http://127.0.0.1:9", "unused")), OpenAI.APIConnectionError);
  step(`errors of every class: 400 401 403 404 409 413 422 429 (${limited.length} of 6) 502, timeout, no connection`);
}
