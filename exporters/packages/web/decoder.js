// Runs one sequence of a bundle: its graph, its caches and its explicit latent state, in plain JavaScript.
//
// Everything is bound by the manifest's contract alone: names, types, symbolic shapes, and which outputs are the state.
// A prompt is read stepwise, which is exact, or iterated to the fixed point of the recurrence: from zero memory, passes
// over a chunk are repeated with the latents of the pass before, until the estimated error is within the tolerance.
// Knows nothing of text, files and pages; `ort` is onnxruntime-web, or whatever has its Tensor.

const CHUNK_TOKENS = 128;
const MOST_PASSES = 16;
const FIRST_SLOTS = 64;
const NOISE = 5e-6; // how much passes differ at the fixed point in float32
const CACHE_RATIO = 5; // keys and values may be so many times less exact than the latent
const [MARGIN, FIRST_MARGIN, FIRST_MARGIN_CACHE] = [3, 4, 6]; // the contraction is measured, and drifts

const ARRAYS = { int64: BigInt64Array, float32: Float32Array };

export class Decoder {
  /** `session` is one of `prefill.windowed.onnx`, whose number of tokens is free; it decodes too. */
  constructor(ort, session, manifest, precision) {
    const contract = manifest.contracts[precision].windowed;
    this.ort = ort;
    this.session = session;
    this.inputs = contract.inputs;
    this.logits = contract.outputs.find((output) => !contract.state.some((pair) => pair.present === output.name)).name;
    this.latent = contract.state.find((pair) => !pair.in_place); // undefined in a model without memory
    this.caches = contract.state.filter((pair) => pair.in_place);
    this.width = this.latent ? this.latent.shape.at(-1) : 0;
    this.capacity = manifest.max_seq_len;
    for (const { name, dtype } of this.inputs) {
      if (!(dtype in ARRAYS)) throw new Error(`the input ${name} is ${dtype}; a browser runs float32 graphs`);
    }
    this.reset();
  }

  /** Forget everything: no tokens, a latent of zeros. */
  reset() {
    this.length = 0;
    this.slots = 0;
    this.carried = new Float32Array(this.width);
    this.buffers = new Map(this.caches.map((pair) => [pair.past, new Float32Array(0)]));
  }

  /** Append tokens; returns the logits after the last one, and how they were read. The state stays as it was if this fails. */
  async read(tokens, policy, tolerance, onProgress = () => {}) {
    const before = { length: this.length, slots: this.slots, carried: this.carried, buffers: new Map(this.buffers) };
    try {
      return await this.#read(tokens, this.latent ? policy : "stepwise", tolerance, onProgress);
    } catch (error) {
      Object.assign(this, before);
      throw error;
    }
  }

  /** Append one token; returns the logits after it. */
  async step(token) {
    return (await this.read([token], "stepwise", 0)).logits;
  }

  async #read(tokens, policy, tolerance, onProgress) {
    const end = this.length + tokens.length;
    if (end > this.capacity) throw new Error(`${end} tokens are more than the capacity of ${this.capacity}`);
    this.#grow(end);
    const report = { policy, passes: 0, residual: 0, fallback: null, logits: null };
    let computed = 0;
    for (let start = 0; start < tokens.length; ) {
      let chunk = tokens.slice(start, start + (policy === "stepwise" ? 1 : CHUNK_TOKENS));
      const found = await this.#converge(chunk, policy === "stepwise" ? 0 : tolerance);
      computed += found.computed;
      report.residual = Math.max(report.residual, found.residual);
      if (found.exact < chunk.length) {
        report.fallback = `the iteration did not converge at token ${this.length + found.exact}`;
        chunk = chunk.slice(0, found.exact);
        policy = "stepwise"; // the rest, to the end of the prompt
      }
      report.logits = found.logits;
      this.length += chunk.length;
      this.carried = found.latents.slice(chunk.length * this.width, (chunk.length + 1) * this.width);
      start += chunk.length;
      onProgress(start, tokens.length);
    }
    report.passes = computed / tokens.length;
    return report;
  }

  /**
   * Iterate one chunk behind the state. Row t of `latents` (T + 1, C) is m for token t: the first one is carried in.
   * `exact` says how many tokens count: all of them, or those that equal stepwise reading by construction.
   */
  async #converge(tokens, tolerance) {
    const latents = new Float32Array((tokens.length + 1) * this.width);
    latents.set(this.carried);
    const [changes, cacheChanges] = [[], []];
    for (let pass = 1; ; pass++) {
      const { logits, made, change: cacheChange } = await this.#run(tokens, latents, pass > 1);
      const change = largestDifference(made, latents.subarray(this.width));
      latents.set(made, this.width);
      if (pass > 1) {
        changes.push(change);
        cacheChanges.push(cacheChange);
      }
      const found = { logits, latents, computed: pass * tokens.length, exact: tokens.length, residual: 0 };
      // After k passes the first k tokens have seen what stepwise reading would have given them.
      if (pass >= tokens.length || !this.latent) return found;
      found.residual = errorBound(changes, FIRST_MARGIN);
      const cacheBound = errorBound(cacheChanges, FIRST_MARGIN_CACHE);
      if (found.residual <= tolerance && cacheBound <= CACHE_RATIO * tolerance) return found;
      if (pass >= MOST_PASSES || !Number.isFinite(change)) return { ...found, residual: 0, exact: pass };
    }
  }

  /** Run the graph on tokens behind the state; returns logits, the latent of each token, and the change of the caches. */
  async #run(tokens, latents, compares) {
    const [start, end] = [this.length, this.length + tokens.length];
    const sizes = { batch: 1, tokens: tokens.length, capacity: this.slots, rows: 1 };
    const feeds = {};
    for (const { name, dtype, shape } of this.inputs) {
      const dims = shape.map((dim) => sizes[dim] ?? dim);
      const count = dims.reduce((product, dim) => product * dim, 1);
      let values;
      if (this.buffers.has(name)) values = this.buffers.get(name);
      else if (name === this.latent?.past) values = latents.slice(0, count);
      else values = ARRAYS[dtype].from({ length: count }, (_, i) => BigInt(this.#index(name, i, tokens, start, end)));
      feeds[name] = new this.ort.Tensor(dtype, values, dims);
    }
    const results = await this.session.run(feeds, { logSeverityLevel: 3 });
    let change = 0;
    for (const { past, present, shape } of this.caches) {
      const [old, now] = [this.buffers.get(past), results[present].data];
      if (compares) change = Math.max(change, this.#changeOfSlots(old, now, shape.at(-1), start, end));
      this.buffers.set(past, now);
    }
    return { logits: results[this.logits].data, made: this.latent ? results[this.latent.present].data : latents, change };
  }

  /** The numbers of the inputs that are neither state nor weights. */
  #index(name, i, tokens, start, end) {
    if (name === "input_ids") return tokens[i];
    if (name === "position_ids") return start + i;
    if (name === "write_index") return start;
    if (name === "last_index") return tokens.length - 1;
    if (name === "window_end") return end;
    if (name === "slot_positions") return i;
    const window = /^window_start_(\d+)$/.exec(name);
    if (window) return Math.max(0, start - Number(window[1]));
    throw new Error(`the input ${name} is not known to this page; make the package again with this bundle's lrt-deploy`);
  }

  #changeOfSlots(old, now, width, start, end) {
    let largest = 0;
    for (let head = 0; head < now.length; head += this.slots * width) {
      const [from, to] = [head + start * width, head + end * width];
      largest = Math.max(largest, largestDifference(now.subarray(from, to), old.subarray(from, to)));
    }
    return largest;
  }

  /** Make room for `end` tokens: caches are about as long as what they hold, and their length doubles. */
  #grow(end) {
    if (end <= this.slots) return;
    const slots = Math.min(this.capacity, Math.max(end, 2 * this.slots, FIRST_SLOTS));
    for (const { past, shape } of this.caches) {
      const [heads, width] = [shape[1], shape[3]];
      const [old, buffer] = [this.buffers.get(past), new Float32Array(heads * slots * width)];
      for (let head = 0; head < heads; head++) {
        buffer.set(old.subarray(head * this.slots * width, (head + 1) * this.slots * width), head * slots * width);
      }
      this.buffers.set(past, buffer);
    }
    this.slots = slots;
  }
}

/** Estimate the error after passes that changed so much: margin * change * q / (1 - q) + noise, q the contraction. */
export function errorBound(changes, firstMargin) {
  if (changes.length < 2) return Infinity;
  const ratios = [];
  for (let i = 1; i < changes.length; i++) {
    if (changes[i - 1] > 20 * NOISE) ratios.push(changes[i] / changes[i - 1]);
  }
  const q = ratios.length ? Math.max(...ratios.slice(-3)) : 0.5; // all noise: memory is too weak for a ratio
  if (!(q < 1)) return Infinity;
  return ((ratios.length > 1 ? MARGIN : firstMargin) * changes.at(-1) * q) / (1 - q) + NOISE;
}

function largestDifference(a, b) {
  let largest = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i] - b[i]);
    if (!(difference <= largest)) largest = difference; // also where it is NaN, which then stays
  }
  return largest;
}
