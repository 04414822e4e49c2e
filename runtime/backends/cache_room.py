"""How many slots caches have that grow with their sequence: few enough to attend to, seldom enough copied.

Attention reads empty slots as well, and growing means copying into larger caches. Knows numbers of tokens only.
"""

from __future__ import annotations

import math

UNIT = 32  # slots; caches have a multiple of it


def room_for(end: int) -> int:
    """Slots for `end` tokens that come one by one: the next multiple of about 4 sqrt(end).

    A copy costs what the caches hold, an empty slot the same for every token until then: the sum of both is least
    where steps grow with the root of the length. The factor was measured (128 slots a step before: up to 6% slower).
    """
    step = -(-4 * math.isqrt(end) // UNIT) * UNIT
    return -(-end // step) * step


def room_for_prompt(end: int, total: int) -> int:
    """Slots for `end` tokens of prompts that will have come to `total`: a quarter more, until all have room.

    In the steps of `room_for`, copying took a tenth of the time of reading 2,048 tokens. What the last quarter had too
    much, every later step would read.
    """
    more = -(-(end + end // 4) // UNIT) * UNIT
    return max(room_for(end), min(more, room_for(total + 1)))
