"""The options that several verbs share, each declared once, and the few values they are gathered into.

Names of backends, precisions and prefill policies are spelled out here, so that `--help` and completion list them and a
wrong one is a usage error. Whether a number is in its range is the library's to say.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from lrt_deploy import files
from lrt_deploy.errors import InputError

from . import output

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder
    from lrt_deploy.runtime.prompt_cache import PromptCache

# The library's names; a test holds these lists against its own.
BackendName = Literal["auto", "ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"]
EngineName = Literal["auto", "tensorrt", "tensorrt-rtx"]
PrecisionName = Literal["fp32", "fp16", "bf16", "int8", "int8-weight-only", "int4-weight-only"]
PolicyName = Literal["auto", "stepwise", "fixed-point", "zero"]


def listed(names: Any) -> str:  # noqa: ANN401 - a literal type
    """The values of a literal type for a help text, where no line break divides one."""
    *others, last = get_args(names)
    return f"{', '.join(others)} or {last}"


# Typer takes literal types for single values and enums for lists of them.
if TYPE_CHECKING:
    PrecisionItem = str
else:
    PrecisionItem = StrEnum("PrecisionItem", [(name, name) for name in get_args(PrecisionName)])

_SAMPLING, _RUN = "How tokens are chosen", "What runs it"

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, made by `lrt-deploy export`.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]

Backend = Annotated[
    BackendName,
    typer.Option(
        metavar="NAME",
        help=f"What runs the model: {listed(BackendName)}; `lrt-deploy doctor` says which can run here.",
        rich_help_panel=_RUN,
    ),
]
Precision = Annotated[
    PrecisionName | None,
    typer.Option(
        metavar="NAME",
        help=f"Precision to run: {listed(PrecisionName)}; default: the most precise in the bundle.",
        rich_help_panel=_RUN,
    ),
]
MaxSeqLen = Annotated[
    int | None, typer.Option(help="Lower the capacity of a sequence, and its memory.", rich_help_panel=_RUN)
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=_RUN)]
Verify = Annotated[
    bool, typer.Option("--verify", help="Hash all files again, also those found intact before.", rich_help_panel=_RUN)
]
Prefill = Annotated[
    PolicyName,
    typer.Option(metavar="NAME", help=f"How prompts are read: {listed(PolicyName)}.", rich_help_panel=_RUN),
]
Tolerance = Annotated[
    float | None,
    typer.Option(help="Largest error of the latent that an iterated prefill may leave.", rich_help_panel=_RUN),
]
PromptCacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache",
        metavar="DIR",
        help="Keep what was read of prompts in this folder, and reuse it; other processes may share it.",
        rich_help_panel=_RUN,
    ),
]

Prompt = Annotated[str | None, typer.Option(help="Prompt text; <|bos|> is put in front.")]
Tokens = Annotated[str | None, typer.Option(metavar="1,2,3", help="Prompt as token ids, taken as they are.")]

MaxNewTokens = Annotated[int, typer.Option(help="Stop after this many tokens.", rich_help_panel=_SAMPLING)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 is off.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float, typer.Option(help="Keep the smallest set of this probability.", rich_help_panel=_SAMPLING)]
MinP = Annotated[
    float, typer.Option(help="Keep what has this share of the most likely token's.", rich_help_panel=_SAMPLING)
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1 discourages tokens that occurred.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None, typer.Option(help="Stop at this text, which is left out; repeatable.", rich_help_panel=_SAMPLING)
]
IgnoreStopTokens = Annotated[
    bool,
    typer.Option("--ignore-stop-tokens", help="Go on after <|assistant_end|> and <|bos|>.", rich_help_panel=_SAMPLING),
]


@dataclass(frozen=True)
class Runner:
    """Which decoder to open on a bundle."""

    backend: str
    precision: str | None
    max_seq_len: int | None
    threads: int | None
    verify: bool
    cuda_graph: bool = True

    def open(self, bundle: Path) -> Decoder:
        """The opened decoder; `auto` is answered with what was taken."""
        from lrt_deploy import open_decoder

        decoder = open_decoder(
            bundle,
            self.backend,
            self.precision,
            threads=self.threads,
            max_seq_len=self.max_seq_len,
            verify=self.verify,
            cuda_graph=self.cuda_graph,
        )
        if self.backend == "auto":
            output.say(f"backend {decoder.backend} in {decoder.precision}: {decoder.backend_reason}")
        return decoder


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop."""

    max_new_tokens: int
    stop_strings: tuple[str, ...]
    ignore_stop_tokens: bool
    numbers: dict[str, Any]  # temperature, top_k, top_p, min_p, repetition_penalty
    seed: int | None

    def check(self) -> None:
        """Refuse values out of their ranges, before a bundle is opened or a message is read."""
        from lrt_deploy.runtime.sampling import SamplingOptions

        SamplingOptions(**self.numbers, seed=self.seed)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")

    def arguments(self, turn: int = 0) -> dict[str, Any]:
        """Keyword arguments for `Decoder.generate`; each turn of a chat draws from its own seed."""
        return self.numbers | {
            "max_new_tokens": self.max_new_tokens,
            "stop_strings": self.stop_strings,
            "stop_ids": [] if self.ignore_stop_tokens else None,
            "seed": self.seed if self.seed is None else self.seed + turn,
        }


def open_prompt_cache(folder: Path | None) -> PromptCache | None:
    """The cache in a folder, if one was named."""
    if folder is None:
        return None
    from lrt_deploy.runtime.prompt_cache import PromptCache

    return PromptCache(folder)


def one_prompt(prompt: str | None, tokens: str | None, file: str | None = None) -> str | list[int] | None:
    """The prompt as text or token ids, None if there is none; two of them are a usage error.

    The newline that ends a prompt file is not part of the prompt: editors and echo put it there.
    """
    given = {"--prompt": prompt, "--prompt-file": file, "--tokens": tokens}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise typer.BadParameter(f"{' and '.join(named)} exclude each other; give one of them")
    if file is not None:
        return read_text(file).removesuffix("\n").removesuffix("\r")
    return prompt if tokens is None else parse_tokens(tokens)


def parse_tokens(text: str) -> list[int]:
    """Token ids from `1,2,3`; whether the model has them is the library's to say."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in parts:
        if not re.fullmatch(r"[+-]?[0-9]{1,30}", part):
            raise typer.BadParameter(f"--tokens has {part[:40]!r} where a whole number is expected, as in 1,2,3")
    return [int(part) for part in parts]


def check_tolerance(tolerance: float | None) -> None:
    """Refuse a tolerance that is no positive number; whether a precision can reach it is said when a prompt is read."""
    if tolerance is not None and not (isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance is {tolerance}, expected a number, 0 or more")


def check_file(path: Path | None, what: str) -> None:
    """Refuse a file that is not there, before anything that takes time."""
    if path is not None and not path.exists():
        raise InputError(f"{what} {path} does not exist")


def check_writable(folder: Path, what: str) -> None:
    """Refuse a folder that cannot be made or written to, before anything that takes time."""
    existing = next((parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent)), folder)
    if not existing.is_dir():
        raise InputError(f"{what} cannot be written to {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{what} cannot be written to {folder}: {existing} may not be written to")


def read_text(name: str) -> str:
    """The text of a regular file, or of stdin for `-`, newlines as they are."""
    if name != "-":
        return files.read_text(Path(name), "the text", InputError, files.MAX_TEXT_BYTES)
    try:
        data = sys.stdin.buffer.read(files.MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"the text cannot be read from stdin: {error.strerror}") from error
    if len(data) > files.MAX_TEXT_BYTES:
        raise InputError(f"the text on stdin has more than {files.MAX_TEXT_BYTES} bytes, the most that are accepted")
    return files.decode_text(data, "the text on stdin", InputError)


def prompt_ids(decoder: Decoder, prompt: str | list[int]) -> list[int]:
    """The token ids of a prompt; text needs a bundle with a tokenizer."""
    if not isinstance(prompt, str):
        return prompt
    if decoder.tokenizer is None:
        raise InputError("this bundle has no tokenizer, so give --tokens; or export it again with --tokenizer")
    return decoder.tokenizer.encode_prompt(prompt, decoder.max_seq_len)
