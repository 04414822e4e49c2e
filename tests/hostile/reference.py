"""Run graphs of a bundle with nothing but onnxruntime and numpy, token by token, as a reference for what a bundle says.

Independent of the runtime: no bindings, no windows kept by anyone, caches of the whole capacity.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .originals import PROMPT, STEPS

NO_POSITION = np.iinfo(np.int64).max


def _session(path: Path):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def full_graph_numbers(bundle: Path, config, capacity: int, precision: str) -> np.ndarray:
    """Logits (STEPS, V) of the greedy continuation, by the full flavour of the prefill graph."""
    return _numbers(bundle, f"graphs/{precision}/prefill.onnx", config, capacity, windowed=False)


def windowed_graph_numbers(bundle: Path, config, capacity: int, precision: str) -> np.ndarray:
    """The same by the windowed flavour, the one that the CPU backend runs."""
    return _numbers(bundle, f"graphs/{precision}/prefill.windowed.onnx", config, capacity, windowed=True)


def _numbers(bundle: Path, graph: str, config, capacity: int, windowed: bool) -> np.ndarray:
    session = _session(bundle / graph)
    wanted = {value.name for value in session.get_inputs()}
    tables = _tables(bundle, graph) if "input_ids" not in wanted else {}
    shape = (1, config.n_kv_head, capacity, config.head_dim)
    feed = {f"past_{kind}_{i}": np.zeros(shape, np.float32) for kind in ("key", "value") for i in range(config.n_layer)}
    latent = np.zeros((1, 1, config.n_embd), np.float32)
    names = [value.name for value in session.get_outputs()]
    tokens, rows = list(PROMPT), []
    for position in range(len(PROMPT) + STEPS - 1):
        token = np.array([[tokens[position]]])
        inputs = {"input_ids": token, "position_ids": np.array([[position]]), "write_index": np.array([position])}
        inputs |= {"last_index": np.zeros((1, 1), np.int64), "past_latent": latent, **feed}
        inputs |= {name: table[token].astype(np.float32) for name, table in tables.items()}
        if windowed:
            slots = np.arange(capacity)
            inputs["slot_positions"] = np.where(slots <= position, slots, NO_POSITION)
            inputs["window_end"] = np.array([position + 1])
            inputs |= {f"window_start_{w}": np.array([max(0, position - w)]) for w in set(config.windows)}
        found = dict(zip(names, session.run(None, {k: v for k, v in inputs.items() if k in wanted}), strict=True))
        feed = {name: found[name.replace("past", "present")] for name in feed}
        latent = found.get("present_latent", latent)
        if position >= len(PROMPT) - 1:
            rows.append(found["logits"].reshape(-1))
            tokens.append(int(rows[-1].argmax()))
    return np.stack(rows)


def _tables(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    import json

    precision = graph.split("/")[1]
    records = json.loads((bundle / "manifest.json").read_bytes())["tables"][precision]
    data = (bundle / "graphs" / precision / "tables.bin").read_bytes()
    return {
        name: np.frombuffer(data, record["dtype"], int(np.prod(record["shape"])), record["offset"]).reshape(
            record["shape"]
        )
        for name, record in records.items()
    }
