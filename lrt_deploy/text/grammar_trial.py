"""Compile a grammar as a program of its own, so that time and memory that it takes can be bounded; see `grammar`.

Reads one JSON object from stdin: the grammar in llguidance's form, its limits, and the seconds and bytes that it may
take. Writes what is wrong with the grammar to stdout, or nothing. Imports nothing of this package.
"""

import contextlib
import json
import sys
from typing import Any, ClassVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper


class Bytes:
    """A vocabulary of all bytes and one token that ends a text."""

    bos_token_id, eos_token_id = None, 256
    tokens: ClassVar = [*(bytes([byte]) for byte in range(256)), b"<eos>"]
    special_token_ids: ClassVar = [256]

    def __call__(self, text: bytes) -> list[int]:
        """Return the ids of a text."""
        return list(text)


def limit(seconds: int, max_bytes: int) -> None:
    """Bound this process, where the system can."""
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def problem(grammar: str, limits: dict[str, Any]) -> str:
    """Return what is wrong with a grammar, or an empty text."""
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()), slices=[])
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**limits))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error()


def main() -> None:
    """Try one grammar."""
    request = json.load(sys.stdin)
    limit(request["seconds"], request["bytes"])
    sys.stdout.write(problem(request["grammar"], request["limits"]))


if __name__ == "__main__":
    main()
