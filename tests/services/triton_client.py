"""A client of Triton by its own gRPC library, as a process: it reads a request as JSON on stdin and prints JSON.

    python triton_client.py ADDRESS MODEL

The request: `requests`, a list of input tensors each (`text_input`, `sampling_parameters`, booleans), all of which are
streamed at the same time; `cancel_after`: cancel each stream after so many responses. The answer: for each request
`text`, `token_ids`, `finish_reason`, `responses` and `error`, and the `seconds` that all took together.
"""

from __future__ import annotations

import json
import queue
import sys
import time
from typing import Any

import numpy as np
import tritonclient.grpc as grpc

SECONDS = 120


class Stream:
    """One request in a stream of its own."""

    def __init__(self, address: str, model: str, inputs: dict[str, Any]) -> None:
        self.client, self.found = grpc.InferenceServerClient(address), queue.SimpleQueue[tuple[Any, Any]]()
        self.client.start_stream(lambda result, error: self.found.put((result, error)))
        self.model, self.inputs = model, inputs
        self.answer: dict[str, Any] = {
            "text": "",
            "token_ids": [],
            "finish_reason": None,
            "responses": 0,
            "error": None,
        }

    def send(self) -> None:
        tensors = []
        for name, value in self.inputs.items():
            array = np.array(
                [value] if isinstance(value, bool) else [value.encode()],
                dtype=bool if isinstance(value, bool) else object,
            )
            tensors.append(grpc.InferInput(name, [1], "BOOL" if isinstance(value, bool) else "BYTES"))
            tensors[-1].set_data_from_numpy(array)
        self.client.async_stream_infer(self.model, tensors, enable_empty_final_response=True)

    def receive(self, cancel_after: int | None) -> dict[str, Any]:
        """Take responses until the last one, or cancel after some."""
        answer = self.answer
        while True:
            result, error = self.found.get(timeout=SECONDS)
            if error is not None:
                answer["error"] = error.message()
                break
            if (text := result.as_numpy("text_output")) is not None and text.size:
                answer["text"] += text[0].decode()
                answer["responses"] += 1
            if (tokens := result.as_numpy("token_ids")) is not None:
                answer["token_ids"] += tokens.tolist()
            if (reason := result.as_numpy("finish_reason")) is not None and reason.size:
                answer["finish_reason"] = reason[0].decode()
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
            if answer["responses"] == cancel_after:
                self.client.stop_stream(cancel_requests=True)
                return answer
        self.client.stop_stream()
        return answer


def main() -> None:
    address, model = sys.argv[1:]
    asked = json.load(sys.stdin)
    streams = [Stream(address, model, inputs) for inputs in asked["requests"]]
    begin = time.monotonic()
    for stream in streams:
        stream.send()
    answers = [stream.receive(asked.get("cancel_after")) for stream in streams]
    json.dump({"answers": answers, "seconds": time.monotonic() - begin}, sys.stdout)


if __name__ == "__main__":
    main()
