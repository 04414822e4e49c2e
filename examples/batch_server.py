r"""A server loop: requests come in as JSON lines, 8 run at once, text goes out as it comes.

printf '%s\n' '{"prompt": "Return the"}' '{"prompt": "A list"}' | python examples/batch_server.py BUNDLE
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading

import lrt_deploy


def main(bundle: str) -> None:
    """Serve until the input ends and all requests are answered."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in [*sys.stdin, None]], daemon=True).start()
    with lrt_deploy.open_decoder(bundle) as decoder:
        batch, listening = lrt_deploy.BatchDecoder(decoder), True
        while listening or batch.waiting or batch.running:
            idle = not (batch.waiting or batch.running)  # wait for a request only when there is nothing else to do
            while listening and (idle or not lines.empty()):
                idle, line = False, lines.get()
                if line is None:
                    listening = False
                    continue
                try:
                    request = json.loads(line)
                    number = batch.submit(request.pop("prompt"), **request)
                    print(json.dumps({"request": number, "accepted": True}), flush=True)
                except lrt_deploy.LRTDeployError as error:
                    print(json.dumps({"error": str(error)}), flush=True)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    text = f"expected a JSON object with `prompt` and options of BatchDecoder.submit: {error!r}"
                    print(json.dumps({"error": text}), flush=True)
            for found in batch.step():
                outcome = {"error": str(found.error)} if found.event is None else vars(found.event) | {"prefill": None}
                print(json.dumps({"request": found.request} | outcome), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    main(**vars(parser.parse_args()))
