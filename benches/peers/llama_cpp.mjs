// llama.cpp by way of node-llama-cpp: a round of speeds for each line on stdin, as one JSON object a line; tokens a second, MiB.
// usage: node llama_cpp.mjs GGUF   (in a folder with node-llama-cpp@3; no GPU, two threads)
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { getLlama } from "node-llama-cpp";

const prompt = (length, salt) => Array.from({ length }, (_, at) => 100 + ((at * 7 + salt * 131) % 3000));
const mebibytes = (field) => Number(new RegExp(`${field}:\\s+(\\d+)`).exec(readFileSync("/proc/self/status", "utf8"))[1]) / 1024;

const llama = await getLlama({ gpu: false, build: "never", maxThreads: 2 });
const before = mebibytes("VmRSS");
const model = await llama.loadModel({ modelPath: process.argv[2] });

async function alone(round) {
  const context = await model.createContext({ contextSize: 1024, threads: 2, batchSize: 512 });
  let started = performance.now(), first = 0, count = 0;
  for await (const _ of context.getSequence().evaluate(prompt(256, 1 + 10 * round), { temperature: 0 })) {
    if (count === 0) { first = performance.now() - started; started = performance.now(); }
    if (++count > 128) break;
  }
  const rest = performance.now() - started;
  await context.dispose();
  return { prefill: 256e3 / first, one: 128e3 / rest };
}

async function together(round) {
  const context = await model.createContext({ contextSize: 512, sequences: 8, threads: 2, batchSize: 512 });
  const sequences = Array.from({ length: 8 }, () => context.getSequence());
  const started = performance.now();
  await Promise.all(sequences.map(async (sequence, nth) => {
    let count = 0;
    for await (const _ of sequence.evaluate(prompt(32, 2 + nth + 10 * round), { temperature: 0 })) if (++count >= 96) break;
  }));
  const eight = (8 * 96e3) / (performance.now() - started);
  await context.dispose();
  return { eight };
}

let round = 0;
for await (const _ of createInterface({ input: process.stdin })) {
  const speeds = { ...(await alone(round)), ...(await together(round)) };
  console.log(JSON.stringify({ ...speeds, peak: mebibytes("VmHWM"), resident: mebibytes("VmRSS"), before }));
  round += 1;
}
process.exit(0);
