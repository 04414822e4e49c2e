"""Bodies of requests: read with bounds on each and on all together, and parsed where nobody waits for it.

The values of a JSON text take up to 25 times its memory, so only `_LONG_AT_ONCE` long bodies are parsed at a time, and
what the others hold meanwhile is their text.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .request_fields import ApiError, json_value

MAX_BODY_BYTES = 4 * 2**20
MAX_HELD_BYTES = 16 * MAX_BODY_BYTES  # of all bodies together that were not parsed
_LONG_BYTES = 16 * 2**10  # a longer body is parsed in another thread, so that the server goes on answering
_LONG_AT_ONCE = 2

_Parsed = TypeVar("_Parsed")


class Bodies:
    """Reads and parses the bodies of a server's requests, in its event loop.

    `takes_long` tells of a JSON value whether what its request means may take seconds to find out.
    """

    def __init__(self, takes_long: Callable[[object], bool]) -> None:
        self._takes_long = takes_long
        self._held = 0  # bytes of bodies that were not parsed
        self._long = asyncio.Semaphore(_LONG_AT_ONCE)
        self._parsing = ThreadPoolExecutor(1, "tokenizing")
        self._slow = ThreadPoolExecutor(2, "grammars and templates")

    async def parsed(self, size: str, parts: AsyncIterator[bytes], parse: Callable[[object], _Parsed]) -> _Parsed:
        """Return what `parse` makes of the JSON value in a body that comes in `parts`; `size` is what its head says.

        Raises ApiError for a body that is no JSON (400), that is too large (413), or that comes while others hold all
        the memory for bodies (503).
        """
        async with self.held(size, parts) as data:
            long = len(data) >= _LONG_BYTES
            async with self._long if long else contextlib.nullcontext():
                return await self._value(data, long, parse)

    @contextlib.asynccontextmanager
    async def held(self, size: str, parts: AsyncIterator[bytes]) -> AsyncIterator[bytearray]:
        """Read a body without parsing it; it counts among those that are held until the context ends.

        Raises ApiError as `parsed` does.
        """
        data = bytearray()
        try:
            await self._read(size, parts, data)
            yield data
        finally:
            self._held -= len(data)

    async def _read(self, size: str, parts: AsyncIterator[bytes], data: bytearray) -> None:
        """Read a body into `data`; one that says that it is larger than may be is not read at all."""
        too_large = ApiError(f"the body has more than {MAX_BODY_BYTES} bytes, the most that are accepted", None, 413)
        if not size.isdecimal() or int(size[:20]) > MAX_BODY_BYTES:
            raise too_large
        async for part in parts:
            data += part
            self._held += len(part)
            if len(data) > MAX_BODY_BYTES:
                raise too_large
            if self._held > MAX_HELD_BYTES and len(data) > _LONG_BYTES:
                raise ApiError(
                    f"requests that are being read hold {MAX_HELD_BYTES} bytes, the most that this server takes; try "
                    "again later",
                    None,
                    503,
                    "bodies",
                )

    async def _value(self, data: bytearray, long: bool, parse: Callable[[object], _Parsed]) -> _Parsed:
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(self._parsing, json_value, data) if long else json_value(data)
        if self._takes_long(body):
            return await loop.run_in_executor(self._slow, parse, body)
        return await loop.run_in_executor(self._parsing, parse, body) if long else parse(body)
