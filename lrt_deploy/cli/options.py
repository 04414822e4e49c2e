"""The options that several verbs share, each declared once, and the objects that they become.

Names of backends, precisions and prefill policies are spelled out, so that `--help` and completion list them and a
wrong one is a usage error. Whether a number is in its range is checked by the library.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args, get_origin

import typer

from lrt_deploy import files
from lrt_deploy.bundle.precisions import BACKENDS, PLAN_BACKENDS, PRECISIONS
from lrt_deploy.errors import CheckpointError, InputError

from . import output

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder
    from lrt_deploy.runtime.prompt_cache import PromptCache

# Names that the library owns, as types that typer lists and completes.
if TYPE_CHECKING:
    BackendName: TypeAlias = str
    EngineName: TypeAlias = str
    PrecisionName: TypeAlias = str
else:
    BackendName = Literal[("auto", *sorted(BACKENDS))]
    EngineName = Literal[("auto", *PLAN_BACKENDS)]
    PrecisionName = Literal[PRECISIONS]
PolicyName = Literal["auto", "stepwise", "fixed-point", "zero"]  # `types.PrefillPolicy`, without its import of numpy

SAMPLING, RUNNING = "How tokens are chosen", "What runs it"  # groups of options in the help


def listed(names: Any) -> str:  # noqa: ANN401 - a literal type
    """Join the values of a literal type for a help text."""
    *others, last = get_args(names)
    return f"{', '.join(others)} or {last}"


def option(help: str, metavar: str | None = None, panel: str | None = None) -> Any:  # noqa: ANN401 - typer's type
    """Declare an option: its help, the word for its value, and its group in the help."""
    return typer.Option(help=help, metavar=metavar, rich_help_panel=panel)


def parameter(name: str, annotation: Any, default: object) -> inspect.Parameter:  # noqa: ANN401 - a type
    """Return a parameter as typer takes it: flags have no `--no-` form, and lists of names hold enums."""
    kind, declared = get_args(annotation)
    if kind is bool and not declared.param_decls:
        declared.param_decls = (f"--{name.replace('_', '-')}",)
    for member in get_args(kind):
        if get_origin(member) is list and (names := get_args(get_args(member)[0])):  # `list[Literal[names]] | None`
            kind = list[StrEnum("Name", [(value, value) for value in names])] | None  # type: ignore[misc]
    annotation = Annotated[kind, declared]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder, made by `lrt-deploy export`.")]
CHECKPOINT = "a folder, a weights file, nanochat's base folder, or hf://owner/name[@revision] on the Hugging Face Hub"
Json = Annotated[bool, option("Print exactly one JSON document on stdout and nothing else.")]
Debug = Annotated[bool, option("Print the traceback of an error.")]
Prompt = Annotated[str | None, option("Prompt text; <|bos|> is put in front.")]
Tokens = Annotated[str | None, option("Prompt as token ids, taken as they are.", "1,2,3")]
Prefill = Annotated[PolicyName, option(f"How prompts are read: {listed(PolicyName)}.", "NAME", RUNNING)]
Tolerance = Annotated[
    float | None, option("Largest error of the latent that an iterated prefill may leave.", panel=RUNNING)
]
VERIFY = "Hash all files again, also those found intact before."


@dataclass(frozen=True)
class DecoderOptions:
    """Options of every verb that opens a decoder on a bundle."""

    backend: Annotated[
        BackendName,
        option(
            f"What runs the model: {listed(BackendName)}; `lrt-deploy doctor` says which can run here.", "NAME", RUNNING
        ),
    ] = "ort-cpu"
    precision: Annotated[
        PrecisionName | None,
        option(f"Precision to run: {listed(PrecisionName)}; default: the most precise in the bundle.", "NAME", RUNNING),
    ] = None
    max_seq_len: Annotated[int | None, option("Lower the capacity of a sequence, and its memory.", panel=RUNNING)] = (
        None
    )
    threads: Annotated[int | None, option("CPU threads.", panel=RUNNING)] = None
    verify: Annotated[bool, option(VERIFY, panel=RUNNING)] = False

    def open(self, bundle: Path, cuda_graph: bool = True) -> Decoder:
        """Open the decoder; with `auto`, print which backend was taken and why."""
        from lrt_deploy import open_decoder

        decoder = open_decoder(bundle, **dataclasses.asdict(self), cuda_graph=cuda_graph)
        if self.backend == "auto":
            output.say(f"backend {decoder.backend} in {decoder.precision}: {decoder.backend_reason}")
        return decoder


@dataclass(frozen=True)
class PromptOptions:
    """Options of the verbs that read prompts to go on from them."""

    prefill: Prefill = "auto"
    tolerance: Tolerance = None
    prompt_cache: Annotated[
        Path | None,
        option(
            "Keep what was read of prompts in this folder, and reuse it; other processes may share it.", "DIR", RUNNING
        ),
    ] = None

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `Decoder.prefill`, `Decoder.generate` and `PromptCache.prefill`."""
        return {"policy": self.prefill, "tolerance": self.tolerance}

    def open_cache(self) -> PromptCache | None:
        """Open the prompt cache, if a folder was named."""
        if self.prompt_cache is None:
            return None
        from lrt_deploy.runtime.prompt_cache import PromptCache

        return PromptCache(self.prompt_cache)


@dataclass(frozen=True)
class GenerationOptions:
    """Options of the verbs that generate. Values out of range raise InputError."""

    max_new_tokens: Annotated[int, option("Stop after this many tokens.", panel=SAMPLING)] = 64
    temperature: Annotated[float, option("0 is greedy.", panel=SAMPLING)] = 0.0
    top_k: Annotated[int, option("Keep the k most likely tokens; 0 is off.", panel=SAMPLING)] = 0
    top_p: Annotated[float, option("Keep the smallest set of this probability.", panel=SAMPLING)] = 1.0
    min_p: Annotated[float, option("Keep what has this share of the most likely token's.", panel=SAMPLING)] = 0.0
    repetition_penalty: Annotated[float, option("Above 1 discourages tokens that occurred.", panel=SAMPLING)] = 1.0
    seed: Annotated[int | None, option("Makes sampling repeatable.", panel=SAMPLING)] = None
    stop: Annotated[list[str] | None, option("Stop at this text, which is left out; repeatable.", panel=SAMPLING)] = (
        None
    )
    ignore_stop_tokens: Annotated[bool, option("Go on after <|assistant_end|> and <|bos|>.", panel=SAMPLING)] = False

    def __post_init__(self) -> None:
        from lrt_deploy.runtime.sampling import SamplingOptions

        SamplingOptions(**self._sampling, seed=self.seed)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")

    @property
    def _sampling(self) -> dict[str, Any]:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}

    def arguments(self, turn: int = 0) -> dict[str, Any]:
        """Keyword arguments for `Decoder.generate`; each turn of a chat has its own seed."""
        return self._sampling | {
            "max_new_tokens": self.max_new_tokens,
            "stop_strings": tuple(self.stop or ()),
            "stop_ids": [] if self.ignore_stop_tokens else None,
            "seed": self.seed if self.seed is None else self.seed + turn,
        }


def one_prompt(prompt: str | None, tokens: str | None, file: str | None = None) -> str | list[int] | None:
    """Return the prompt as text, without the newline that ends a file, or as token ids; None if there is none."""
    given = {"--prompt": prompt, "--prompt-file": file, "--tokens": tokens}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise typer.BadParameter(f"{' and '.join(named)} exclude each other; give one of them")
    if file is not None:
        return read_text(file).removesuffix("\n").removesuffix("\r")
    return prompt if tokens is None else parse_tokens(tokens)


def parse_tokens(text: str) -> list[int]:
    """Parse token ids, as `1,2,3`; the library checks whether the model has them."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in parts:
        if not re.fullmatch(r"[+-]?[0-9]{1,30}", part):
            raise typer.BadParameter(f"--tokens has {part[:40]!r} where a whole number is expected, as in 1,2,3")
    return [int(part) for part in parts]


def check_tolerance(tolerance: float | None) -> None:
    """Raise InputError for a tolerance below 0; a precision's own limit is checked when a prompt is read."""
    if tolerance is not None and not (isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance is {tolerance}, expected a number, 0 or more")


def check_checkpoint(source: str) -> None:
    """Raise InputError or CheckpointError for what is no checkpoint by its name alone; fetch nothing."""
    from lrt_deploy.bundle.manifest import instead_of
    from lrt_deploy.model.hub import check_source

    path = check_source(source, "the checkpoint")
    if isinstance(path, Path):
        if mistaken := instead_of("checkpoint", path):
            raise CheckpointError(mistaken)
        check_file(path, "the checkpoint")


def check_file(path: Path | None, what: str) -> None:
    """Raise InputError for a file that does not exist."""
    if path is not None and not path.exists():
        raise InputError(f"{what} {path} does not exist")


def read_text(name: str) -> str:
    """Read the text of a regular file, or of stdin for `-`; newlines stay as they are."""
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
    """Return the token ids of a prompt; InputError for text where the bundle has no tokenizer."""
    if not isinstance(prompt, str):
        return prompt
    if decoder.tokenizer is None:
        raise InputError("this bundle has no tokenizer, so give --tokens; or export it again with --tokenizer")
    return decoder.tokenizer.encode_prompt(prompt, decoder.max_seq_len)
