"""The authors' chat form: its special tokens, and the order in which roles must speak.

    <|bos|><|user_start|>...<|user_end|><|assistant_start|>...<|assistant_end|><|user_start|>...

A system message is joined to the first user message by a blank line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lrt_deploy.errors import InputError
from lrt_deploy.fields import shown

BOS = "<|bos|>"
USER_START, USER_END = "<|user_start|>", "<|user_end|>"
ASSISTANT_START, ASSISTANT_END = "<|assistant_start|>", "<|assistant_end|>"
CONTROL_TOKENS = {BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END}


ROLES = ("system", "user", "assistant")


def check_messages(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return role and content of each message; raises InputError for what is none."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InputError(f"messages is {shown(messages)}, expected a list of objects with the texts role and content")
    found = []
    for index, message in enumerate(messages):
        turn = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else ()
        if not turn or not isinstance(turn[0], str) or not isinstance(turn[1], str):
            raise InputError(f"message {index} is not an object with the texts role and content")
        found.append((turn[0], turn[1]))
    return found


def turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return role and content of each turn, the system message joined in; raises InputError for another form."""
    found = check_messages(messages)
    if len(found) > 1 and found[0][0] == "system" and found[1][0] == "user":
        found[:2] = [("user", f"{found[0][1]}\n\n{found[1][1]}")]
    roles = [role for role, _ in found]
    if len(found) % 2 == 0 or roles != ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]:
        raise InputError(
            f"the roles are {', '.join(m['role'] for m in messages)[:200] or 'none'}; expected an optional system "
            "message, then user and assistant in turns, a user last"
        )
    return found
