"""Continue token ids greedily with a bundle's decode-step graph, by NumPy and ONNX Runtime alone.

python own_runtime.py BUNDLE 1,2,3 64 [PRECISION]
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

DTYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


class Sequence:
    """One sequence: its caches, its latent, and a session that advances them by one token."""

    def __init__(self, bundle, precision):
        manifest = json.loads((bundle / "manifest.json").read_text())
        contract = manifest["contracts"][precision]["full"]
        sizes = {"batch": 1, "tokens": 1, "rows": 1, "capacity": manifest["max_seq_len"]}
        self.session = ort.InferenceSession(bundle / "graphs" / precision / "decode_step.onnx")
        self.binding = self.session.io_binding()
        self.inputs = {spec["name"]: self.zeros(spec, sizes) for spec in contract["inputs"]}
        self.outputs = {spec["name"]: self.zeros(spec, sizes) for spec in contract["outputs"]}
        for pair in contract["state"]:
            if pair["in_place"]:  # a cache: input and output are one array
                self.outputs[pair["present"]] = self.inputs[pair["past"]]
        # An OrtValue on the CPU is a view of its NumPy array, so everything is bound once.
        for name, array in self.inputs.items():
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in self.outputs.items():
            self.binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.length, self.capacity = 0, manifest["max_seq_len"]
        self.vocabulary = manifest["model"]["vocab_size"]

    @staticmethod
    def zeros(spec, sizes):
        """Make the array of an input or output; zeros are the latent before the first token."""
        return np.zeros([sizes.get(size, size) for size in spec["shape"]], DTYPES[spec["dtype"]])

    def advance(self, token):
        """Append a token; return the logits (V) of the next one."""
        assert 0 <= token < self.vocabulary, "ids outside of the vocabulary must never reach a graph"
        assert self.length < self.capacity, "the caches are full"
        self.inputs["input_ids"][:] = token
        self.inputs["position_ids"][:] = self.inputs["write_index"][:] = self.length
        self.session.run_with_iobinding(self.binding)
        if "past_latent" in self.inputs:  # every layer reads the latent, so it has a second array
            self.inputs["past_latent"][:] = self.outputs["present_latent"]
        self.length += 1
        return self.outputs["logits"][0, 0]


def main():
    """Read the prompt token by token, then choose the likeliest token again and again."""
    bundle, prompt, count = Path(sys.argv[1]), json.loads(f"[{sys.argv[2]}]"), int(sys.argv[3])
    sequence = Sequence(bundle, sys.argv[4] if len(sys.argv) > 4 else "fp32")
    for token in prompt:
        logits = sequence.advance(token)
    found = [int(logits.argmax())]
    while len(found) < count:
        found.append(int(sequence.advance(found[-1]).argmax()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
