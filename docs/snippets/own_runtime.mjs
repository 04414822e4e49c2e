// Continue token ids greedily with a bundle's decode-step graph, by onnxruntime-node alone.
//
//   node own_runtime.mjs BUNDLE 1,2,3 64

import { readFileSync } from "node:fs";
import { join } from "node:path";
import ort from "onnxruntime-node";

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

// Make the tensor of an input or output; zeros are the latent before the first token.
function zeros(spec, sizes) {
  const shape = spec.shape.map((size) => sizes[size] ?? size);
  const count = shape.reduce((product, size) => product * size, 1);
  return new ort.Tensor(spec.dtype, new ARRAYS[spec.dtype](count), shape);
}

// One sequence: its caches, its latent, and a session that advances them by one token.
class Sequence {
  static async open(bundle, precision = "fp32") {
    const sequence = new Sequence();
    const manifest = JSON.parse(readFileSync(join(bundle, "manifest.json"), "utf8"));
    const contract = manifest.contracts[precision].full;
    const sizes = { batch: 1, tokens: 1, rows: 1, capacity: manifest.max_seq_len };
    const tensors = (specs) => Object.fromEntries(specs.map((spec) => [spec.name, zeros(spec, sizes)]));
    sequence.session = await ort.InferenceSession.create(join(bundle, "graphs", precision, "decode_step.onnx"));
    sequence.inputs = tensors(contract.inputs);
    sequence.outputs = tensors(contract.outputs);
    for (const pair of contract.state) {
      // A cache is one array for input and output, which the graph updates in place.
      if (pair.in_place) sequence.outputs[pair.present] = sequence.inputs[pair.past];
    }
    sequence.capacity = manifest.max_seq_len;
    sequence.vocabulary = manifest.model.vocab_size;
    sequence.length = 0;
    return sequence;
  }

  // Append a token; return the logits (V) of the next one.
  async advance(token) {
    if (!(token >= 0 && token < this.vocabulary)) throw new RangeError(`${token} is no token of this model`);
    if (this.length >= this.capacity) throw new RangeError("the caches are full");
    this.inputs.input_ids.data[0] = BigInt(token);
    this.inputs.position_ids.data[0] = this.inputs.write_index.data[0] = BigInt(this.length);
    const found = await this.session.run(this.inputs, this.outputs);
    // Every layer reads the latent, so it has a second array.
    if (found.present_latent) this.inputs.past_latent.data.set(found.present_latent.data);
    this.length += 1;
    return found.logits.data;
  }
}

const likeliest = (logits) => logits.reduce((best, value, id) => (value > logits[best] ? id : best), 0);

const [bundle, prompt, count] = process.argv.slice(2);
const sequence = await Sequence.open(bundle);
let logits;
for (const token of prompt.split(",")) logits = await sequence.advance(Number(token));
const found = [likeliest(logits)];
while (found.length < Number(count)) found.push(likeliest(await sequence.advance(found.at(-1))));
console.log(JSON.stringify(found));
