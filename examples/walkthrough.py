# %% [markdown]
# # From a text to a served model
#
# Train a small Latent Recurrent Transformer, export it, compare the export with PyTorch, generate, measure its quality,
# serve it, and talk to it: about ten minutes on two cores. Each `# %%` begins a cell in editors that know them (VS
# Code, Spyder, Jupyter with Jupytext). It runs as a script as well:
#
#     python examples/walkthrough.py
#     python examples/walkthrough.py --text FILE --minutes 5 --folder my-walk
#
# It needs the extras `export` and `serve`, and tiktoken for the training script.

# %%
"""From a text to a served model: training, export, parity, generation, evaluation, and a chat over HTTP.

python examples/walkthrough.py --text FILE --minutes 5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import lrt_deploy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", type=Path, metavar="FILE", help="train on this UTF-8 text instead of Python's own")
parser.add_argument("--minutes", type=float, default=5.0, help="how long to train (default: 5)")
parser.add_argument("--quick", action="store_true", help="train for a second and export fp32 alone, to see it run")
parser.add_argument("--folder", type=Path, default=Path("walkthrough"), help="a new folder for all files")
chosen, _ = parser.parse_known_args()  # a notebook's own arguments are none of ours

minutes, width, threads, precisions, steps = chosen.minutes, 160, 2, ["fp32", "int8-weight-only"], 64
if chosen.quick:
    minutes, width, threads, precisions, steps = 0.02, 32, 1, ["fp32"], 8
chosen.folder.mkdir(parents=True)
checkpoint, bundle, held_out = (chosen.folder / name for name in ("checkpoint", "bundle", "held-out.txt"))

# %% [markdown]
# ## Train
#
# `train_tiny.py` trains a tokenizer and a model, and writes a checkpoint in the layout of the paper's authors. The
# lines `bits per byte by pass` show what the latent is worth: the first number is without it, the last one with it.
# At the end it prints samples by PyTorch.

# %%
command = [sys.executable, Path(__file__).with_name("train_tiny.py") if "__file__" in globals() else "train_tiny.py"]
command += ["--out", checkpoint, "--held-out", held_out, "--width", width, "--minutes", minutes]
command += ["--threads", threads, *(["--text", chosen.text] if chosen.text else [])]
subprocess.run([str(word) for word in command], check=True)

# %% [markdown]
# ## Export
#
# The model is traced once and written in two precisions. A checkpoint on the Hugging Face Hub would be named
# `hf://owner/name`.

# %%
lrt_deploy.export_bundle(checkpoint, bundle, precision=precisions)
for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
    print(f"{path.stat().st_size:>12,} bytes  {path.relative_to(bundle)}")

# %% [markdown]
# ## Compare with PyTorch
#
# Errors feed back through the latent, so a whole rollout is compared. In fp32 every token has to be the same. INT8
# weights are another model: that they are the checkpoint's, that the graph computes what it should, and what it costs
# in quality are judged apart.

# %%
for precision in precisions:
    report = lrt_deploy.parity(bundle, checkpoint, precision=precision, steps=steps)
    print(f"{precision}: {report.verdict}")
    assert report.passed or precision != "fp32"

# %% [markdown]
# ## Generate
#
# From here on no PyTorch is needed: this is what a deployment runs. A state can be forked, saved and restored: the
# second continuation begins where the prompt ends, and reads nothing again.

# %%
with lrt_deploy.open_decoder(bundle) as decoder:
    assert decoder.tokenizer is not None
    prompt = decoder.tokenizer.encode_prompt("Return the")
    state = decoder.prefill([prompt])
    again = state.fork()
    for temperature, start in ((0.0, state), (0.8, again)):
        print(f"\ntemperature {temperature}: Return the", end="")
        for event in decoder.generate(None, 48, state=start, temperature=temperature, seed=1):
            print(event.text, end="", flush=True)
    print()

# %% [markdown]
# ## Evaluate
#
# Bits per byte on a text that was held out, in both precisions; a byte stored as it is takes 8.

# %%
sample = chosen.folder / "sample.txt"
sample.write_text(held_out.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
lrt = [sys.executable, "-m", "lrt_deploy"]
for precision in precisions:
    evaluate = [*lrt, "eval", bundle, sample, "--precision", precision, "--json"]
    found = json.loads(subprocess.run([str(word) for word in evaluate], check=True, stdout=subprocess.PIPE).stdout)
    print(f"{precision}: {found['bits_per_byte']:.3f} bits per byte over {found['bytes']:,} bytes")

# %% [markdown]
# ## Serve
#
# The server has OpenAI's API, and a chat page at its address. With `--json` it prints its address once it is ready;
# port 0 takes a free one.

# %%
serve = [*lrt, "serve", str(bundle), "--port", "0", "--slots", "4", "--json"]
server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
assert server.stdout is not None
lines: list[str] = []
while not lines or lines[-1].rstrip() != "}":
    lines.append(server.stdout.readline())
    assert lines[-1], "the server ended; its message is above"
url = json.loads("".join(lines))["url"]
print(f"serving on {url}")


def ask(path: str, body: dict[str, object]) -> dict[str, list[dict[str, dict[str, str]]]]:
    """Post JSON to the server, and return what it answers."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, list[dict[str, dict[str, str]]]] = json.load(response)
        return answer


# %% [markdown]
# ## Talk to it
#
# A chat turn, and a second one that sends the whole conversation: the server finds the state of what it has read
# before. The model was never trained on conversations, so expect text and not answers.

# %%
try:
    messages = [{"role": "user", "content": "What does the while statement do?"}]
    for question in ("And the for statement?", None):
        answer = ask("/v1/chat/completions", {"messages": messages, "max_tokens": 24, "temperature": 0})
        text = answer["choices"][0]["message"]["content"]
        print(f"user: {messages[-1]['content']}\nassistant: {text!r}")
        messages += [{"role": "assistant", "content": text}]
        messages += [] if question is None else [{"role": "user", "content": question}]
finally:
    server.terminate()
    print(f"the server ended with exit code {server.wait()}")
