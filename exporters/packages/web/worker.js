// The worker behind the page: loads the bundle, checks its hashes, reads prompts, and generates until it is stopped.
//
// Messages in: open, generate {text, chat, policy, tolerance, temperature, count}, stop, restart.
// Messages out: loading, ready, reading, prompt, answer {text, tokens}, end {reason, tokens, msPerToken}, error.

import * as ort from "./lib/ort.wasm.min.mjs";
import { Tokenizer } from "./lib/tokenizers.min.mjs";
import { Decoder } from "./decoder.js";

const HERE = new URL("./", import.meta.url);
const BOS = "<|bos|>";
const ENDS = ["<|assistant_end|>", BOS];

let decoder, encodeText, decodeTokens, special, ids; // ids: how many the model may choose from
let pending = []; // the last token of an answer, which is read with what follows it
let stopped = false;

onmessage = async ({ data }) => {
  try {
    if (data.type === "stop") stopped = true;
    else if (data.type === "restart") restart();
    else if (data.type === "open") await open();
    else if (data.type === "generate") await generate(data);
  } catch (error) {
    postMessage({ type: "error", message: error.message });
  }
};

async function open() {
  const list = await (await get("lrt-package.json")).json();
  const text = await (await get("bundle/manifest.json")).text();
  const manifest = JSON.parse(text);
  await check(new TextEncoder().encode(text), list.bundle_sha256, "manifest.json");
  const folder = `graphs/${list.precision}/`;
  const weights = await load(`${folder}weights.bin`, manifest);
  const graph = await load(`${folder}prefill.windowed.onnx`, manifest);
  const json = JSON.parse(new TextDecoder().decode(await load("tokenizer/tokenizer.json", manifest)));
  readTokenizer(json);
  ids = manifest.tokenizer_tokens;
  ort.env.wasm.wasmPaths = new URL("lib/", HERE).href;
  ort.env.wasm.numThreads = 1; // more need headers that a plain folder does not send
  const externalData = [{ path: "weights.bin", data: weights }];
  const options = { executionProviders: ["wasm"], externalData, logSeverityLevel: 3 };
  const session = await ort.InferenceSession.create(graph, options);
  decoder = new Decoder(ort, session, manifest, list.precision);
  const chat = special.has("<|assistant_start|>");
  const { capacity } = decoder;
  postMessage({ type: "ready", precision: list.precision, capacity, memory: Boolean(decoder.latent), chat });
}

async function get(name) {
  const response = await fetch(new URL(name, HERE));
  if (!response.ok) throw new Error(`${name} cannot be loaded: ${response.status} ${response.statusText}`);
  return response;
}

/** Load a file of the bundle, say how far it is, and hold it against the manifest. */
async function load(name, manifest) {
  const { bytes, sha256 } = manifest.files[name];
  const reader = (await get(`bundle/${name}`)).body.getReader();
  const data = new Uint8Array(bytes);
  let done = 0;
  for (let part; !(part = await reader.read()).done; done += part.value.length) {
    if (done + part.value.length > bytes) throw new Error(`${name} has more than ${bytes} bytes`);
    data.set(part.value, done);
    postMessage({ type: "loading", name, done, total: bytes });
  }
  await check(data.subarray(0, done), sha256, name);
  return data;
}

async function check(data, sha256, name) {
  if (!globalThis.crypto?.subtle) return; // browsers have it on https and on localhost only
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== sha256) throw new Error(`${name} is not the file that was packaged: its hash is another one`);
}

function readTokenizer(json) {
  special = new Map(json.added_tokens.map((token) => [token.content, token.id]));
  // In text the name of a special token is text; in answers it is shown.
  const encoder = new Tokenizer({ ...json, added_tokens: [] }, {});
  const answers = new Tokenizer(json, { clean_up_tokenization_spaces: false });
  encodeText = (text) => (text ? Array.from(encoder.encode(text, { add_special_tokens: false }).ids) : []);
  decodeTokens = (tokens) => answers.decode(tokens, { skip_special_tokens: false });
}

function restart() {
  decoder.reset();
  pending = [];
}

/** The tokens of what a person wrote: the first text begins with <|bos|>, a turn of a chat stands between its marks. */
function promptTokens(text, chat) {
  const mark = (name) => (special.has(name) ? [special.get(name)] : []);
  const first = decoder.length + pending.length === 0 ? mark(BOS) : [];
  if (!chat) return [...first, ...encodeText(text)];
  const turn = [...mark("<|user_start|>"), ...encodeText(text), ...mark("<|user_end|>"), ...mark("<|assistant_start|>")];
  return [...first, ...turn];
}

async function generate({ text, chat, policy, tolerance, temperature, count }) {
  stopped = false;
  const prompt = [...pending, ...promptTokens(text, chat)];
  if (!prompt.length) throw new Error("the prompt is empty");
  const began = performance.now();
  const read = await decoder.read(prompt, policy, tolerance, async (done, total) => {
    postMessage({ type: "reading", done, total });
  });
  pending = [];
  const { passes, residual, fallback } = read;
  const held = decoder.length;
  postMessage({ type: "prompt", tokens: prompt, held, policy: read.policy, passes, residual, fallback, ms: performance.now() - began });
  const ends = ENDS.filter((name) => special.has(name)).map((name) => special.get(name));
  const tokens = [];
  let [logits, reason, started] = [read.logits, "limit", performance.now()];
  while (tokens.length < count) {
    await messages();
    if (stopped) {
      reason = "stopped";
      break;
    }
    if (pending.length) logits = await decoder.step(pending[0]);
    const token = choose(logits, temperature);
    tokens.push(token);
    pending = [token];
    postMessage({ type: "answer", token, text: decodeTokens(tokens).replace(/\ufffd+$/, "") });
    if (ends.includes(token)) reason = "end";
    else if (decoder.length >= decoder.capacity) reason = "capacity";
    else continue;
    break;
  }
  const steps = Math.max(1, tokens.length - 1);
  postMessage({ type: "end", reason, tokens, text: decodeTokens(tokens), msPerToken: (performance.now() - started) / steps });
}

/** Let messages that have arrived be handled. */
function messages() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => resolve(port1.close());
    port2.postMessage(null);
  });
}

/** The most probable token, or with a temperature a random one; ids that have no token are left out. */
function choose(logits, temperature) {
  let best = 0;
  for (let i = 1; i < ids; i++) if (logits[i] > logits[best]) best = i;
  if (!(temperature > 0)) return best;
  const weights = Array.from(logits.subarray(0, ids), (logit) => Math.exp((logit - logits[best]) / temperature));
  let rest = Math.random() * weights.reduce((sum, weight) => sum + weight, 0);
  for (let i = 0; i < ids; i++) if ((rest -= weights[i]) < 0) return i;
  return best;
}
