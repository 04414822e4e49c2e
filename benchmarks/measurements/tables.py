"""Tables of docs/measurements.md from the JSON documents: each stands between two comments and is replaced as a whole.

    <!-- measured NAME -->
    ...
    <!-- end of measured NAME -->

Rendering reads nothing but the documents, so that the same documents always give the same page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from . import record

PAGE = record.ROOT / "docs" / "measurements.md"
MARKED = re.compile(r"(<!-- measured ([\w-]+) -->\n).*?(<!-- end of measured \2 -->)", re.DOTALL)
PRECISIONS = ("fp32", "fp16", "int8", "int8-weight-only", "int4-weight-only")
# Tables that are taken from another table's document.
SOURCES = {"states": "batches", "memory": "opening"}

# Load average for each core, above which other work must have run beside what was measured.
BUSY = 1.5

Document = dict[str, Any]


def render(page: str, documents: dict[str, Document]) -> str:
    """Return the page with every marked part rendered; KeyError for a part that has no document."""

    def part(found: re.Match[str]) -> str:
        name = found[2]
        document = documents[SOURCES.get(name, name)]
        return f"{found[1]}\n{origin(document)}\n\n{TABLES[name](document['results'])}\n\n{found[3]}"

    return MARKED.sub(part, page)


def write_page() -> None:
    """Render docs/measurements.md in place."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(render(text, record.read()), encoding="utf-8")


def origin(document: Document) -> str:
    """Return when, on what and with which commands a document was measured."""
    load, found = document["load_average"], document["versions"]
    where = f"{document['date']}, {document['mode']} mode: {document['processor']}, {document['cores']} cores"
    how = f"load average {load['start']:.1f} before and {load['end']:.1f} after"
    what = f"Python {document['python']}, ONNX Runtime {found['onnxruntime']}, torch {found['torch']}"
    commands = "\n".join(f"    {command}" for command in document["commands"])
    busy = max(load.values()) > BUSY * document["cores"]
    warning = " **Other work held the cores: only ratios within one run say something here.**" if busy else ""
    return f"{commands}\n\n{where}; {how}; {what}, revision `{document['revision']}`.{warning}"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """Return a Markdown table; columns after the first `words` are numbers."""
    rule = ["---" if index < words else "---:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (heads, rule, *rows))


def number(value: float) -> str:
    """Return a number in three digits, without an exponent, with separators of thousands."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def small(value: float) -> str:
    """Return a small number with an exponent."""
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def megabytes(value: float) -> str:
    """Return bytes in MB."""
    return f"{number(value / 1e6)} MB"


def decode_runs(results: Document) -> list[Document]:
    """Return the figures of each model and precision, with rates from the fastest step and the best bandwidth."""
    found = []
    bandwidth = max(rate for model in results["models"] for rate in model["read_bandwidth_gb_s"])
    for model in results["models"]:
        base = next(row for row in model["rows"] if row["precision"] == "fp32")
        for row in model["rows"]:
            moved = row["weight_bytes_per_step"] + row["state_bytes_per_step"]
            rates = {
                "model": model["model"],
                "tokens_per_s": 1e3 / row["min_ms"],
                "times_fp32": base["min_ms"] / row["min_ms"],
                "times_fp32_median": base["median_ms"] / row["median_ms"],
                "gb_s": moved / row["min_ms"] / 1e6,
                "bound_tokens_per_s": bandwidth * 1e9 / moved,
                "bandwidth_gb_s": bandwidth,
            }
            found.append(row | rates)
    return found


def decode(results: Document) -> str:
    """Decoding by precision."""
    runs = decode_runs(results)
    rows = [
        (
            run["model"],
            run["precision"],
            megabytes(run["weight_bytes_per_step"]),
            f"{number(run['min_ms'])} / {number(run['median_ms'])}",
            number(run["tokens_per_s"]),
            f"{run['times_fp32']:.1f} × / {run['times_fp32_median']:.1f} ×",
            number(run["gb_s"]),
            "in cache" if run["weights_fit_cache"] else f"{run['gb_s'] / run['bandwidth_gb_s']:.0%}",
        )
        for run in runs
    ]
    heads = ["model", "precision", "weights a step", "ms a token: min / median", "tokens/s", "of fp32's: min / median"]
    bandwidth = f"The bandwidth of reading alone was {runs[0]['bandwidth_gb_s']:.1f} GB/s at best."
    return table([*heads, "GB/s", "of the bandwidth"], rows, 2) + f"\n\n{bandwidth}"


def prefill(results: Document) -> str:
    """Reading prompts in every way."""
    rows = []
    for result in results["lengths"]:
        zero = next(row["min_seconds"] for row in result["rows"] if row["policy"] == "zero")
        for row in result["rows"]:
            iterated = row["policy"] == "fixed-point"
            name = row["policy"] if not iterated else f"{row['policy']}, {row['algorithm']}"
            cost = f"{row['min_seconds'] / (row['passes'] * zero):.2f}" if iterated else ""
            error = "" if row["policy"] == "stepwise" else small(row["kl"])
            cells = (f"{row['seconds']:.3g}", f"{row['speedup']:.1f} ×", f"{row['passes']:.2f}", error, cost)
            rows.append((result["model"], result["tokens"], name, *cells))
    heads = ["model", "tokens", "how", "seconds", "against stepwise", "passes", "KL of the next token"]
    return table([*heads, "time ÷ (passes × one zero-memory pass)"], rows, 3)


def quality(results: Document) -> str:
    """Rollouts of every precision."""
    rows = []
    for row in results["rows"]:
        parts = ", ".join("never" if at is None else str(at) for at in row["first_divergence"])
        numbers = (small(row["mean_kl"]), small(row["max_kl"]), f"{row['top1_agreement']:.1%}", parts)
        rows.append((row["precision"], *numbers, f"{row['bits_per_byte']:.5g}", megabytes(row["weight_bytes"])))
    heads = ["precision", "mean KL", "largest KL", "same first choice", f"parts at, of {results['steps']}"]
    return table([*heads, "bits per byte", "weights"], rows)


def batches(results: Document) -> str:
    """Many requests at once against one after another."""
    names = ("one at a time, stepwise", "8 slots", "8 slots in 2 lanes")
    rows = []
    for mix, found in results["batch"].items():
        rates = found["new_tokens_per_s"]
        gain = f"{rates['8 slots'] / rates[names[0]]:.1f} ×"
        equal = min(found["outputs_equal"][name] for name in names[1:])
        size = f"{found['prompt_tokens']:,}, {found['new_tokens']:,}"
        rates_text = [f"{rates[name]:,}" for name in names]
        rows.append((mix, size, *rates_text, gain, f"{equal} of {found['requests']}"))
    heads = ["requests", "tokens of prompts, answers", "one at a time", "8 slots", "8 slots in 2 lanes"]
    return table([*heads, "8 slots ÷ one", "outputs equal"], rows)


def states(results: Document) -> str:
    """Operations on states."""
    columns = ("fork_ms", "rewind_ms", "save_ms", "load_ms", "read_again_ms", "step_ms")
    rows = [
        (row["tokens"], f"{row['file_bytes']:,}", *(number(row[name]) for name in columns))
        for row in results["operations"]
    ]
    heads = [
        "tokens",
        "file, bytes",
        "fork, ms",
        "rewind, ms",
        "save, flushed, ms",
        "load, ms",
        "read again instead, ms",
    ]
    turns = [turn["computed"] for turn in results["chat"]]
    chat = (
        f"A chat of five turns, 40 tokens of message and 20 of answer each, computes {', '.join(map(str, turns[:5]))}"
    )
    rewound = f" token positions while its context grows to {results['chat'][4]['context']}; rewound to token 61 and"
    return (
        table([*heads, "fork and step, ms"], rows, 0) + f"\n\n{chat}{rewound} given 80 others, it computes {turns[5]}."
    )


def serving(results: Document) -> str:
    """Tokens per second as shares of the batch."""
    rows = []
    for name, rounds in results["rounds"].items():
        wall, cpu = ([round_[kind] for round_ in rounds] for kind in ("wall", "cpu"))
        rows.append((name, f"{median(wall):.2f}", f"{median(cpu):.2f}", ", ".join(f"{value:.2f}" for value in wall)))
    return table(["tokens per second", "of time", "of processor time", "of time, round by round"], rows)


PARTS = {
    "imports": "importing the runtime (numpy, ONNX Runtime)",
    "hashing_all_files": "hashing all files: once per bundle, or with `--verify`",
    "hashing_what_is_not_remembered": "hashing when all is remembered",
    "session": "ONNX Runtime's session: mapping, packing the matrices, moving them into huge pages",
    "first_token": "first token after 64",
    "first_token_again": "the same again",
    "open_decoder_again": "the whole of `open_decoder` afterwards",
}


def opening(results: Document) -> str:
    """Milliseconds of the parts of opening, by precision."""
    found = results["precisions"]
    rows = [(text, *(number(each["parts"][f"{name}_ms"]) for each in found)) for name, text in PARTS.items()]
    return table(["part, ms", *(each["precision"] for each in found)], rows)


def memory(results: Document) -> str:
    """Private memory after the parts of opening, by precision."""
    rows = []
    for each in results["precisions"]:
        own = each["own_bytes"]
        shown = [megabytes(each["matrix_bytes"]), *(megabytes(own[name]) for name in ("imports", "session"))]
        rows.append((each["precision"], *shown, megabytes(own["first_token_again"])))
    heads = [
        "precision",
        "matrices",
        "private, after importing",
        "private, after opening",
        "private, after two prompts",
    ]
    return table(heads, rows)


TABLES: dict[str, Callable[[Document], str]] = {
    "decode": decode,
    "prefill": prefill,
    "quality": quality,
    "batches": batches,
    "states": states,
    "serving": serving,
    "opening": opening,
    "memory": memory,
}
