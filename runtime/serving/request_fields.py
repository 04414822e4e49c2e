"""The fields of requests to OpenAI's API, by their types, and errors as it shows them.

Unknown fields are ignored, as in OpenAI's API; known ones that are not supported raise an error that names them. What
values mean, and whether they fit the model, is `openai_api`'s.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from lrt_deploy.errors import BackendError, Busy, DeadlineExceeded, InputError, LRTDeployError, NonFiniteError
from lrt_deploy.fields import LARGEST_INTEGER, convert, shown

from .engine import Draining

_MOST_CHOICES = 128
_MOST_TOP, _MOST_TOP_CHAT = 5, 20  # alternatives beside the chosen token, as in OpenAI's API

_Body = TypeVar("_Body", bound=msgspec.Struct)
_Number = float | None


class ApiError(InputError):
    """A request that is answered with an error: its HTTP status, and the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class StreamOptions(msgspec.Struct):
    """`include_usage` adds a last chunk with the counts of tokens."""

    include_usage: bool | None = None


class LrtFields(msgspec.Struct):
    """`latent_cosine` adds to each choice the cosine of the latents before each of its tokens.

    `priority` and `deadline_s` mean what they mean outside of `lrt`.
    """

    latent_cosine: bool = False
    priority: int | None = None
    deadline_s: _Number = None


class Fields(msgspec.Struct, kw_only=True):
    """Fields of completions and chats. None is what OpenAI's clients send for an option that is not given."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=LARGEST_INTEGER)] | None = None
    n: Annotated[int, Meta(ge=1, le=_MOST_CHOICES)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: _Number = None
    top_p: _Number = None
    top_k: int | None = None
    min_p: _Number = None
    repetition_penalty: _Number = None
    frequency_penalty: _Number = None
    presence_penalty: _Number = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool | None = None
    response_format: dict[str, Any] | None = None
    guided_regex: str | None = None
    prefill: str | None = None
    tolerance: _Number = None
    priority: int | None = None
    deadline_s: _Number = None
    lrt: LrtFields | None = None


class CompletionFields(Fields, kw_only=True):
    """The body of `/v1/completions`."""

    prompt: Any
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=_MOST_CHOICES)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=_MOST_TOP)] | None = None


class ChatFields(Fields, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Meta(ge=0, le=LARGEST_INTEGER)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=_MOST_TOP_CHAT)] | None = None


class TokenizeFields(msgspec.Struct, kw_only=True):
    """The body of `/tokenize`."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class DetokenizeFields(msgspec.Struct, kw_only=True):
    """The body of `/detokenize`."""

    tokens: list[int]


# Known fields that are not supported, and the values that ask for nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "guided_json": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "documents": (None, []),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
}


def json_value(data: bytes | bytearray, name: str = "the body") -> Any:  # noqa: ANN401 - any JSON value
    """Parse JSON that may be hostile; raises ApiError."""
    try:
        return msgspec.json.decode(data)
    except RecursionError as error:
        raise ApiError(f"{name} is nested too deeply to be read") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ApiError(f"{name} is not valid JSON: {error}") from error


def fields_of(kind: type[_Body], body: object) -> _Body:
    """Convert a JSON value to its fields; raises ApiError that names the one that is wrong."""
    if not isinstance(body, dict):
        raise ApiError(f"the body is {shown(body)}, expected a JSON object")
    for name, silent in _REFUSED.items():
        if name in body and body[name] not in silent and name not in kind.__struct_fields__:
            raise ApiError(f"{name} is not supported by this server", name, code="unsupported_parameter")
    try:
        return convert(kind, body)
    except ValueError as error:
        raise ApiError(str(error), named(str(error))) from error


def named(message: str) -> str | None:
    """Return the field that a message begins with."""
    found = re.match(r"(?:sampling option )?([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+)*) (?:is|has|holds|=)", message)
    return found[1] if found else None


@dataclass(frozen=True)
class Failure:
    """An error as OpenAI's API shows it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None

    @classmethod
    def of(cls, error: LRTDeployError) -> Failure:
        """Return what an error means to a client."""
        message = str(error)
        if isinstance(error, ApiError):
            kind = {404: "not_found_error", 503: "server_error"}.get(error.status, "invalid_request_error")
            return cls(error.status, message, kind, error.param, error.code)
        if isinstance(error, Draining):
            return cls(503, message, "server_error", code="draining")
        if isinstance(error, DeadlineExceeded):
            return cls(504, message, "server_error", "deadline_s", "deadline_exceeded")
        if isinstance(error, Busy):
            return cls(429, message, "rate_limit_error", code="queue_full")
        if isinstance(error, BackendError) and not isinstance(error, NonFiniteError):
            return cls(503, message, "server_error", code="backend_failed")
        if isinstance(error, BackendError):
            return cls(500, message, "server_error", code="non_finite")
        return cls(400, message, "invalid_request_error", named(message))

    def body(self) -> dict[str, Any]:
        """Return the JSON value."""
        fields = dataclasses.asdict(self)
        del fields["status"]
        return {"error": fields}
