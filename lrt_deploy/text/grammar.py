"""Grammars of answers: a JSON schema or a regular expression, as the token ids that may come next.

llguidance does the work. Schemas come from strangers, and the library cannot be interrupted: sizes are bounded, and
each grammar is compiled by a process of its own first (`grammar_trial`), which ends after `TRIAL_SECONDS` of CPU time.
Knows no logits and no random numbers. Keywords of JSON Schema that llguidance does not know are refused by name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.errors import InputError
from lrt_deploy.fields import shown
from lrt_deploy.files import parse_json
from lrt_deploy.machine import install, missing

from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# A schema of 64 KiB has about a thousand properties, and compiles in a tenth of a second. Longer literals and
# expressions cost each step, because every character is a state of its own.
MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 2**16, 64
MAX_LITERAL, MAX_REGEX = 4096, 4096  # characters
TRIAL_SECONDS, _TRIAL_WALL_SECONDS = 2, 30  # of CPU time, which a busy machine does not change; and in any case
_TRIAL_BYTES = 2**30
_KEPT = 16  # grammars of one tokenizer that stay compiled
# A state of the lexer takes 1 to 2 KB. The other limits are the library's: a step ends with an error after about 20 ms.
_LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "max_grammar_size": 100_000, "verbose_errors": False}
# Between JSON's tokens stands a space, or a line's end and an indentation: a small model may write spaces without end.
# The other two are the library's defaults.
_JSON: JsonCompileOptions = {
    "whitespace_pattern": r" |\n( {0,32}|\t{0,16})",
    "item_separator": ",",
    "key_separator": ":",
}


@dataclass(frozen=True)
class Grammar:
    """What an answer must match as a whole. Make it with `json_schema` or `regex`.

    An answer ends where the grammar allows nothing more, or at a stop token, which is allowed where the text is whole.
    """

    kind: Literal["json_schema", "regex"]
    text: str
    _compiled: WeakKeyDictionary[Tokenizer, LLMatcher] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Self:
        """Make a grammar from a JSON schema, as an object or as its text; raises InputError beyond the bounds."""
        if isinstance(schema, str):
            _check_size(len(schema))
            schema = parse_json(schema, "the JSON schema", InputError)
        if not isinstance(schema, Mapping):
            raise InputError(f"the JSON schema is {shown(schema)}, expected a JSON object")
        if "x-guidance" in schema:
            raise InputError("the JSON schema has the keyword x-guidance, which would change JSON's form; leave it out")
        _check_value(schema, 0)
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"the JSON schema is no JSON value: {error}") from error
        _check_size(len(text))
        return cls("json_schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Make a grammar from a regular expression in Rust's syntax, without look-around and back-references."""
        if not isinstance(pattern, str):
            raise InputError(f"the regular expression is {shown(pattern)}, expected a text")
        if len(pattern) > MAX_REGEX:
            raise InputError(f"the regular expression has {len(pattern)} characters, expected at most {MAX_REGEX}")
        try:
            pattern.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the regular expression is no Unicode text: {error.reason}") from error
        return cls("regex", pattern)

    def check(self, tokenizer: Tokenizer) -> None:
        """Compile the grammar, unless that has been done; raises InputError if it cannot be used."""
        self.start(tokenizer)

    def start(self, tokenizer: Tokenizer) -> LLMatcher:
        """Return llguidance's matcher before the first token, of which every answer has a copy.

        Raises InputError for a grammar that cannot be used.
        """
        if (matcher := self._compiled.get(tokenizer)) is not None:
            return matcher
        table = _table(tokenizer)
        if (found := table.compiled.get(self)) is None:
            found = table.compiled[self] = _compile(self, table.tokenizer)
            if len(table.compiled) > _KEPT:
                table.compiled.popitem(last=False)
        if isinstance(found, str):
            raise InputError(found)
        self._compiled[tokenizer] = found
        return found


class Matcher:
    """The position of one answer in a grammar, which follows from the answer's tokens alone.

    It is told all of them each time: after an interrupt, or when a token is chosen again, it begins from the start.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        self._start, self._size = grammar.start(tokenizer), tokenizer.vocab_size
        self._matcher = self._start.deep_copy()
        self._followed: list[int] | None = []  # None: not known

    def allowed(self, tokens: Sequence[int]) -> NDArray[np.intp]:
        """Return the ids, ascending, that may follow an answer's tokens; raises InputError where it is too costly."""
        self._follow(tokens)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        found = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: self._size])
        self._check(len(tokens))
        assert found.size, "every byte is a token, so a grammar that is not at its end can go on"
        return found

    def ended(self, tokens: Sequence[int]) -> bool:
        """Return whether the tokens are a whole answer and nothing may follow but its end."""
        self._follow(tokens)
        self._check(len(tokens))
        return self._matcher.is_stopped()

    def _follow(self, tokens: Sequence[int]) -> None:
        followed, self._followed = self._followed, None
        if followed is None or followed != tokens[: len(followed)]:
            self._matcher, followed = self._start.deep_copy(), []
        self._matcher.consume_tokens(list(tokens[len(followed) :]))
        self._followed = list(tokens)

    def _check(self, count: int) -> None:
        if self._matcher.is_error():
            reason = _sentence(self._matcher.get_error())
            raise InputError(f"the grammar cannot be followed beyond {count} tokens: {reason}; use a simpler one")


class _Table(NamedTuple):
    """llguidance's view of a tokenizer, and grammars that were compiled for it, or what is wrong with them."""

    tokenizer: LLTokenizer
    compiled: OrderedDict[Grammar, LLMatcher | str]


_TABLES: WeakKeyDictionary[Tokenizer, _Table] = WeakKeyDictionary()


def _table(tokenizer: Tokenizer) -> _Table:
    if (table := _TABLES.get(tokenizer)) is None:
        if missing("grammar"):
            raise InputError(f"grammars and JSON schemas need llguidance, which is not installed; {install('grammar')}")
        if not tokenizer.stop_ids:
            raise InputError("the tokenizer has no <|assistant_end|> and no <|bos|>, so no token can end an answer")
        from llguidance import LLTokenizer

        ends = sorted(tokenizer.stop_ids)
        table = _Table(LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=ends), OrderedDict())
        _TABLES[tokenizer] = table
    return table


def _compile(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher | str:
    """Return a matcher at the start, or what is wrong with the grammar."""
    from llguidance import LLMatcher, LLParserLimits

    what = "the JSON schema" if grammar.kind == "json_schema" else "the regular expression"
    try:
        if grammar.kind == "json_schema":
            text = LLMatcher.grammar_from_json_schema(grammar.text, overrides=_JSON)
        else:
            text = LLMatcher.grammar_from_regex(grammar.text)
    except ValueError as error:  # a lone surrogate
        return f"{what} cannot be used: {_sentence(str(error))}"
    if reason := _try(text):
        return f"{what} cannot be used: {reason}"
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(**_LIMITS))
    return f"{what} cannot be used: {_sentence(matcher.get_error())}" if matcher.is_error() else matcher


def _try(grammar: str) -> str:
    """Compile a grammar in a process of its own; return what is wrong with it, or an empty text."""
    request = {"grammar": grammar, "limits": _LIMITS, "seconds": TRIAL_SECONDS, "bytes": _TRIAL_BYTES}
    program = [sys.executable, "-P", str(Path(__file__).with_name("grammar_trial.py"))]
    costly = f"it takes more than {TRIAL_SECONDS} seconds or {_TRIAL_BYTES >> 20} MiB to compile; use a simpler one"
    try:
        done = subprocess.run(
            program, input=json.dumps(request).encode(), capture_output=True, timeout=_TRIAL_WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return costly
    except OSError as error:
        return f"no process could be started to try it: {error.strerror}"
    return costly if done.returncode else _sentence(done.stdout.decode("utf-8", "replace"))


def _sentence(message: str) -> str:
    """Return the library's message as one line of bounded length."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]


def _check_size(size: int) -> None:
    if size > MAX_SCHEMA_BYTES:
        raise InputError(f"the JSON schema has {size} bytes, expected at most {MAX_SCHEMA_BYTES}")


def _check_value(value: object, depth: int) -> None:
    """Check the bounds of one value in a schema."""
    if depth > MAX_SCHEMA_DEPTH:
        raise InputError(f"the JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    if isinstance(value, str) and len(value) > MAX_LITERAL:
        raise InputError(
            f"the JSON schema has a text of {len(value)} characters, {shown(value[:20])} and more; "
            f"expected at most {MAX_LITERAL}"
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_value(key, depth + 1)
            _check_value(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(item, depth + 1)
