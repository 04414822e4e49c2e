"""OpenAI's API without HTTP: from a request's JSON value to prompts and options, with every check that it needs.

`parse_completion` and `parse_chat` return a `Call`; `answers` turns what the engine delivers into the JSON of answers.
Unknown fields are ignored, as in OpenAI's API; fields that are known and not supported raise an error that names them.
Text prompts begin with `<|bos|>` as in `lrt-deploy generate`; token ids are taken as they are. Token ids and options
beyond the types are checked where they are used.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar, cast

from lrt_deploy.errors import InputError
from lrt_deploy.fields import check_number, check_whole, shown
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.generation import Generation
from lrt_deploy.runtime.prefill import PrefillRequest
from lrt_deploy.text.chat import ASSISTANT_END, ASSISTANT_START, BOS, USER_END, USER_START
from lrt_deploy.text.grammar import Grammar
from lrt_deploy.text.prompts import check_prompts
from lrt_deploy.text.text_stream import TextStream
from lrt_deploy.types import PrefillPolicy

from .engine import EngineRequest, Prompt
from .request_fields import (
    ApiError,
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    Fields,
    LrtFields,
    TokenizeFields,
    fields_of,
    named,
)

COMPLETION_TOKENS = 16  # where a completion does not say
_MOST_STOPS, _MOST_STOP_CHARACTERS, _MOST_PROMPTS = 16, 4096, 256
_CHAT_TOKENS = (BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END)
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
)

_SHORT_CHAT = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I help you?"},
    {"role": "user", "content": "Thanks"},
)

_Checked = TypeVar("_Checked")
_Value = TypeVar("_Value", int, float)


@dataclass(frozen=True)
class ApiOptions:
    """What a server decides where requests are silent, and what it refuses."""

    model: str
    policy: PrefillPolicy = "auto"
    tolerance: float | None = None
    implicit_bos: bool = False  # put `<|bos|>` in front of token prompts that do not begin with it
    max_tokens_limit: int | None = None  # new tokens of one continuation


class _Tokens(NamedTuple):
    """The token ids of a prompt, and how many at its beginning the caller did not write."""

    ids: list[int]
    hidden: int


class Echo(NamedTuple):
    """A prompt as it is shown: its text, and how many tokens before it are not."""

    text: str
    hidden: int


@dataclass
class Call:
    """A request that was checked: what the engine gets, and what the answer's form depends on."""

    kind: Literal["completion", "chat"]
    model: str
    request: EngineRequest
    choices: int  # of each prompt; the request may make more, of which the best are taken
    stream: bool
    include_usage: bool
    logprobs: bool = False  # whether log-probabilities are shown
    echo: list[Echo] | None = None  # of each prompt, where it is shown
    prompt_tokens: int = 0
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{random.getrandbits(128):032x}"


class Api:
    """Checks requests to one decoder. Raises InputError for a bundle without a tokenizer."""

    def __init__(self, decoder: Decoder, options: ApiOptions) -> None:
        if decoder.tokenizer is None:
            raise InputError("this bundle has no tokenizer, and the API's answers are text; export it with --tokenizer")
        if decoder.tokenizer.chat is not None:
            decoder.tokenizer.chat.check()
        self.decoder, self.options, self.tokenizer = decoder, options, decoder.tokenizer
        self.capacity = decoder.max_seq_len
        self.created = int(time.time())

    def parse_completion(self, body: object) -> Call:
        """Check the body of `/v1/completions`."""
        fields = fields_of(CompletionFields, body)
        self.check_model(fields.model)
        prompts = self._prompts(fields.prompt)
        arguments = self._arguments(fields)
        wanted = COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
        limited = [self._limited(prompt.ids, wanted, fields.max_tokens is not None) for prompt in prompts]
        choices = fields.n or 1
        made = fields.best_of or choices
        if made < choices:
            raise ApiError(f"best_of is {made}, expected n ({choices}) or more", "best_of")
        if made > choices and fields.stream:
            raise ApiError("best_of cannot be streamed: the best are known at the end", "best_of")
        if fields.logprobs is not None:
            arguments["logprobs"] = fields.logprobs
            if fields.echo:
                arguments["prompt_logprobs"] = fields.logprobs
                if arguments["policy"] not in ("auto", "stepwise"):
                    raise ApiError(
                        "prompts with logprobs are read stepwise: prefill must be auto or stepwise", "prefill"
                    )
        call = self._call("completion", fields, EngineRequest(limited, arguments, made, bool(fields.stream)), choices)
        call.logprobs = fields.logprobs is not None
        if fields.echo:
            call.echo = [Echo(self.tokenizer.decode(ids[hidden:]), hidden) for ids, hidden in prompts]
        return call

    def parse_chat(self, body: object) -> Call:
        """Check the body of `/v1/chat/completions`."""
        fields = fields_of(ChatFields, body)
        self.check_model(fields.model)
        ids = self.render(fields.messages)
        arguments = self._arguments(fields)
        wanted = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
        prompt = self._limited(ids, self.capacity if wanted is None else wanted, wanted is not None)
        if fields.top_logprobs and not fields.logprobs:
            raise ApiError(f"top_logprobs is {fields.top_logprobs}, which needs logprobs: true", "top_logprobs")
        if fields.logprobs:
            arguments["logprobs"] = fields.top_logprobs or 0
        choices = fields.n or 1
        call = self._call("chat", fields, EngineRequest([prompt], arguments, choices, bool(fields.stream)), choices)
        call.logprobs = bool(fields.logprobs)
        return call

    def _call(self, kind: Literal["completion", "chat"], fields: Fields, request: EngineRequest, choices: int) -> Call:
        stream, options = bool(fields.stream), fields.stream_options
        if options is not None and not stream:
            raise ApiError("stream_options is for requests with stream: true", "stream_options")
        read = sum(len(prompt.tokens) for prompt in request.prompts)
        usage = bool(options and options.include_usage)
        return Call(kind, self.options.model, request, choices, stream, usage, prompt_tokens=read)

    # Prompts

    def _prompts(self, prompt: object) -> list[_Tokens]:
        """Return the token ids of each prompt in a text, a list of texts, token ids, or a list of lists of them."""
        listed = prompt if isinstance(prompt, list) else [prompt]
        if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
            listed = [prompt]
        if not listed:
            raise ApiError("prompt is an empty list, expected at least one text or token id", "prompt")
        if len(listed) > _MOST_PROMPTS:
            raise ApiError(f"prompt is a list of {len(listed)}, expected at most {_MOST_PROMPTS} prompts", "prompt")
        return [self._prompt(item) for item in listed]

    def _prompt(self, prompt: object) -> _Tokens:
        """Return the token ids of one text, or of token ids."""
        if isinstance(prompt, str):
            return _Tokens(self.encode(prompt, "prompt"), 1)
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            expected = "expected a text, token ids, or a list of one of them"
            raise ApiError(f"prompt is or holds {shown(prompt)}, {expected}", "prompt")
        try:
            check_prompts([prompt], self.decoder.config.vocab_size)
        except InputError as error:
            raise ApiError(str(error), "prompt") from error
        if self.options.implicit_bos and prompt[0] != self.tokenizer.bos_id:
            return _Tokens([self.tokenizer.bos_id, *prompt], 1)
        return _Tokens(prompt, 0)

    def encode(self, text: str, param: str) -> list[int]:
        """Return `<|bos|>` and the tokens of a text."""
        if not text:
            raise ApiError(f"{param} is empty, expected a text of at least one character", param)
        try:
            return self.tokenizer.encode_prompt(text, self.capacity)
        except InputError as error:
            raise ApiError(str(error), param, code="context_length_exceeded") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of a conversation in the checkpoint's chat form, or in the authors'."""
        tokenizer = self.tokenizer
        if tokenizer.chat is None and (
            missing := [name for name in _CHAT_TOKENS if name not in tokenizer.special_tokens]
        ):
            raise ApiError(
                f"this model's tokenizer has no {missing[0]}, which chats need; use /v1/completions", "messages"
            )
        turns = [self._message(index, message) for index, message in enumerate(messages)]
        try:
            tokenizer.check_fits("".join(turn["content"] for turn in turns), self.capacity)
        except InputError as error:
            raise ApiError(str(error), "messages", code="context_length_exceeded") from error
        if not turns:
            raise ApiError("messages is empty, expected at least one message", "messages")
        try:
            return tokenizer.render_chat(turns)
        except InputError as error:
            raise ApiError(f"messages: {error}", "messages") from error

    def tokenize(self, body: object) -> dict[str, Any]:
        """Answer `/tokenize`: token ids of a text, or of chat messages.

        A text that is the name of a special token gives the id of that token.
        """
        fields = fields_of(TokenizeFields, body)
        if (fields.prompt is None) == (fields.messages is None):
            raise ApiError("the body needs prompt or messages, and exactly one of the two", "prompt")
        if fields.messages is not None:
            tokens = self.render(fields.messages)
        elif fields.prompt in self.tokenizer.special_tokens:
            tokens = [self.tokenizer.special_tokens[fields.prompt]]
        else:
            assert fields.prompt is not None
            tokens = self.tokenizer.encode(fields.prompt)
            if fields.add_special_tokens:
                tokens = [self.tokenizer.bos_id, *tokens]
        return {"count": len(tokens), "max_model_len": self.capacity, "tokens": tokens}

    def detokenize(self, body: object) -> dict[str, Any]:
        """Answer `/detokenize`: the text of token ids, special tokens by name."""
        fields, tokenizer = fields_of(DetokenizeFields, body), self.tokenizer
        try:
            return {"prompt": tokenizer.decode(fields.tokens)}
        except InputError as error:
            raise ApiError(str(error), "tokens") from error

    def tokenizer_info(self) -> dict[str, Any]:
        """Answer `/tokenizer_info`: what lm-evaluation-harness asks for."""
        special = self.tokenizer.special_tokens
        chat, bos = self.tokenizer.chat, BOS if BOS in special else None
        template = {} if chat is None else {"chat_template": chat.template.source, **chat.template.tokens}
        return {
            "tokenizer_class": "lrt-deploy",
            "vocab_size": self.tokenizer.vocab_size,
            "model_max_length": self.capacity,
            "bos_token": bos,
            "eos_token": bos,  # documents are separated by it
            "special_tokens": special,
            **template,
        }

    @staticmethod
    def _message(index: int, message: Mapping[str, Any]) -> dict[str, str]:
        name, role, content = f"messages[{index}]", message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            known = "expected system, user or assistant; this model has no messages of tools"
            raise ApiError(f"{name}.role is {shown(role)}, {known}", f"{name}.role")
        for refused in ("tool_calls", "function_call", "audio"):
            if message.get(refused):
                raise ApiError(f"{name}.{refused} is not supported: this model calls no tools", f"{name}.{refused}")
        if isinstance(content, list):
            content = "".join(_text_of(part, f"{name}.content[{i}]") for i, part in enumerate(content))
        if not isinstance(content, str):
            raise ApiError(
                f"{name}.content is {shown(content)}, expected a text or a list of text parts", f"{name}.content"
            )
        return {"role": "system" if role == "developer" else role, "content": content}

    # Options

    def takes_long(self, body: object) -> bool:
        """Return whether parsing a body compiles a grammar or runs a template, which may take seconds."""
        slow = ("response_format", "guided_regex", *(() if self.tokenizer.chat is None else ("messages",)))
        return isinstance(body, dict) and any(body.get(name) is not None for name in slow)

    def model(self) -> dict[str, Any]:
        """Return what `/v1/models` says of the model."""
        return {
            "id": self.options.model,
            "object": "model",
            "created": self.created,
            "owned_by": "lrt-deploy",
            "max_model_len": self.capacity,
            "lrt": {"chat": self.knows_chat, "max_seq_len": self.capacity, "latent": self.decoder.config.memory},
        }

    @cached_property
    def knows_chat(self) -> bool:
        """Whether the model was trained on the chat form: its tokenizer has the tokens, and the model expects them.

        Tokenizers of models that never saw a chat have the tokens too. Such a model gives the end of an answer less
        probability than a uniform choice would. One that brings a chat template was trained on chats.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat is not None:
            return True
        if any(name not in tokenizer.special_tokens for name in _CHAT_TOKENS):
            return False
        ids = tokenizer.render_chat(_SHORT_CHAT)
        ids = ids[: ids.index(tokenizer.special_tokens[ASSISTANT_END]) + 1]
        if len(ids) > self.capacity:
            return True
        (logprobs,) = self.decoder.score([ids])
        return bool(logprobs[-1] > -math.log(tokenizer.vocab_size))

    def check_model(self, model: str | None) -> None:
        """Raise ApiError for another model than the one that is served."""
        if model is not None and model != self.options.model:
            raise ApiError(
                f"there is no model {shown(model)}; this server has {self.options.model!r}",
                "model",
                404,
                "model_not_found",
            )

    def _limited(self, ids: list[int], wanted: int, said: bool) -> Prompt:
        """Return a prompt with its number of new tokens, which must fit if the caller has said it.

        A state of `capacity` tokens gives one more, which has no room in it.
        """
        room, limit = self.capacity - len(ids) + 1, self.options.max_tokens_limit
        if room < 1 or (said and wanted > room):
            asked = f" and {wanted} new ones were asked for" if said else ""
            raise ApiError(
                f"the prompt has {len(ids)} tokens{asked}; together they may be at most {self.capacity + 1}, because "
                f"this model's capacity is {self.capacity} tokens",
                "max_tokens" if room >= 1 else "prompt",
                code="context_length_exceeded",
            )
        if limit is not None and wanted > limit:
            if said:
                raise ApiError(f"max_tokens is {wanted}; this server gives at most {limit}", "max_tokens")
            wanted = limit
        return Prompt(ids, min(wanted, room))

    def _arguments(self, fields: Fields) -> dict[str, Any]:
        """Return the arguments of `BatchDecoder.submit`, checked."""
        sampling: dict[str, Any] = {"temperature": 1.0}
        sampling |= {name: value for name in _SAMPLING if (value := getattr(fields, name)) is not None}
        if sampling.get("top_k") == -1:  # off, in the servers that have this field
            sampling["top_k"] = 0
        sampling["logit_bias"] = _biases(fields.logit_bias or {})
        # OpenAI's seeds may be negative; ours are the same numbers without a sign.
        sampling["seed"] = None if fields.seed is None else fields.seed % 2**64
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        if len(stops) > _MOST_STOPS:
            raise ApiError(f"stop has {len(stops)} texts, expected at most {_MOST_STOPS}", "stop")
        if (characters := sum(map(len, stops))) > _MOST_STOP_CHARACTERS:
            raise ApiError(f"stop has {characters} characters, expected at most {_MOST_STOP_CHARACTERS}", "stop")
        if stops:
            _checked("stop", lambda: TextStream(self.tokenizer.token_bytes_of, stops))
        policy = cast(PrefillPolicy, fields.prefill or self.options.policy)
        tolerance = self.options.tolerance if fields.tolerance is None else fields.tolerance
        memory, precision = self.decoder.config.memory, self.decoder.precision
        _checked("prefill", lambda: PrefillRequest.of(policy, None, memory, precision))
        _checked("tolerance", lambda: PrefillRequest.of(policy, tolerance, memory, precision))
        vocabulary = (self.decoder.tokenizer, self.decoder.config.vocab_size)
        _checked(None, lambda: Generation.of(vocabulary, 1, ((), ()), None, sampling))
        latent_cosine = fields.lrt is not None and fields.lrt.latent_cosine
        if latent_cosine and not memory:
            raise ApiError("lrt.latent_cosine is true, and this model carries no latent state", "lrt.latent_cosine")
        lrt = fields.lrt or LrtFields()
        priority = _either("priority", fields.priority, lrt.priority) or 0
        deadline_s = _either("deadline_s", fields.deadline_s, lrt.deadline_s)
        _checked("priority", lambda: check_whole(priority, "priority", -(2**31), 2**31 - 1))
        if deadline_s is not None:
            _checked("deadline_s", lambda: check_number(deadline_s, "deadline_s", 0))
        grammar = _grammar(fields)
        if grammar is not None:
            param, found = grammar
            for name in ("stop", "ignore_eos"):
                if getattr(fields, name):
                    raise ApiError(f"{name} and {param} exclude each other: an answer ends where its form ends", name)
            _checked(param, lambda: found.check(self.tokenizer))
        return {
            "latent_cosine": latent_cosine,
            "stop_strings": tuple(stops),
            "stop_ids": [] if fields.ignore_eos else None,
            "policy": policy,
            "tolerance": tolerance,
            "priority": priority,
            "deadline_s": deadline_s,
            **({"grammar": grammar[1]} if grammar else {}),
            **sampling,
        }


def _grammar(fields: Fields) -> tuple[str, Grammar] | None:
    """Return the form that the answer must have, and the field that says so."""
    form, regex, found = fields.response_format, fields.guided_regex, []
    if regex is not None:
        found.append(("guided_regex", _checked("guided_regex", lambda: Grammar.regex(regex))))
    kind = "text" if form is None else form.get("type")
    if kind == "json_object":
        found.append(("response_format", Grammar.json_schema({"type": "object"})))
    elif kind == "json_schema":
        assert form is not None
        name, described = "response_format.json_schema", form.get("json_schema")
        if not isinstance(described, dict) or not isinstance(schema := described.get("schema"), dict):
            raise ApiError(f"{name} is {shown(described)}, expected an object with a JSON schema in schema", name)
        name += ".schema"
        found.append((name, _checked(name, lambda: Grammar.json_schema(schema))))
    elif kind != "text":
        known = "expected text, json_object or json_schema"
        raise ApiError(f"response_format.type is {shown(kind)}, {known}", "response_format.type")
    if len(found) > 1:
        raise ApiError("guided_regex and response_format exclude each other; give one of them", "guided_regex")
    return found[0] if found else None


def _either(name: str, outside: _Value | None, inside: _Value | None) -> _Value | None:
    """Return a field that may stand in the request or under its `lrt`."""
    if outside is not None and inside is not None and outside != inside:
        raise ApiError(f"lrt.{name} is {inside}, and {name} is {outside}; give one of the two", f"lrt.{name}")
    return inside if outside is None else outside


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    """Return the logit bias by token id; keys of JSON objects are texts."""
    for token in given:
        if not re.fullmatch("[0-9]{1,18}", token):
            raise ApiError(f"logit_bias has the key {shown(token)}, expected a token id", "logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _checked(param: str | None, check: Callable[[], _Checked]) -> _Checked:
    """Call `check`; what it says of a wrong value is the answer."""
    try:
        return check()
    except InputError as error:
        raise ApiError(str(error), param or named(str(error))) from error


def _text_of(part: object, name: str) -> str:
    """Return the text of one part of a message's content."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise ApiError(f"{name} is {shown(kind)}, expected a part of the type text", name)
