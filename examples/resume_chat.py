"""Leave a chat in one process and go on with it in another: the state is a file, and nothing is read twice.

python examples/resume_chat.py BUNDLE chat.state "Say something about lists."
python examples/resume_chat.py BUNDLE chat.state "And about tuples?"      # tomorrow, in another process
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lrt_deploy
from lrt_deploy.text.chat import ASSISTANT_END


def main(bundle: str, file: str, message: str) -> None:
    """One turn: load what there is, read only the message, answer, save."""
    with lrt_deploy.open_decoder(bundle) as decoder:
        assert decoder.tokenizer is not None
        opened = decoder.tokenizer.render_chat([{"role": "user", "content": message}])
        if Path(file).exists():
            state = decoder.load_state(file)
            decoder.prefill([opened[1:]], state=state)  # without <|bos|>: the chat has begun
        else:
            state = decoder.prefill([opened])
        read = int(state.lengths[0])
        for event in decoder.generate(None, 48, state=state):
            print(event.text, end="", flush=True)
        print()
        # Close the answer, where it did not end by itself.
        end = decoder.tokenizer.special_tokens[ASSISTANT_END]
        if event.token != end:
            decoder.prefill([[end]], state=state)
        state.save(file)
        print(f"{read} tokens with the message, {state.lengths[0]} saved, {state.num_bytes} bytes", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("file", help="the state of the chat; made where there is none")
    parser.add_argument("message")
    main(**vars(parser.parse_args()))
