"""Read one prompt by iterating the recurrence to its fixed point, with an estimate of the remaining error.

h_t = F(m = h_{t-1}; tokens up to t) holds for all t at once. From zero memory, a *sweep* computes every position of a
chunk once, in `stride` blocks: positions 0, s, 2s, ..., then 1, s + 1, ..., each from the latest latents and caches.
Stride 1 is Jacobi iteration (one parallel pass a sweep, m shifted by one), a larger stride block Gauss-Seidel, and
stride T stepwise reading. How fast each converges: docs/numerics.md.

After every block one more of the leading positions equals stepwise reading, so a chunk that does not contract is
finished stepwise from there. `error_bound` estimates the error from what the blocks have changed, and reading stops as
soon as that is within the tolerance. Long prompts are read chunk by chunk, which bounds memory. During sweeps the slots
of a chunk hold its tokens block by block, because caches are written in consecutive slots; `StateBuffers.reorder` tells
the mask, and puts them back at the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.fields import LARGEST_COUNT, check_number, check_whole
from lrt_deploy.runtime.backends.base import Block, StateBuffers
from lrt_deploy.tolerances import FLOAT32_RESIDUAL_NOISE
from lrt_deploy.types import FloatArray, IntArray


@dataclass(frozen=True)
class SweepOptions:
    """How a chunk is iterated; the defaults are the measured best (docs/numerics.md)."""

    stride: int = 2
    chunk_tokens: int = 128
    largest_chunk_tokens: int = 512  # far from the start, and where nothing is iterated
    max_sweeps: int = 16
    min_block_tokens: int = 8
    piece_tokens: int = LARGEST_COUNT  # of a block that are computed in one call, at most; see `Sweeps.read_in_pieces`
    noise: float = FLOAT32_RESIDUAL_NOISE  # of the precision: how much sweeps differ at the fixed point, max abs
    noise_rms: float = 0.0  # the same as root mean square, where the precision rounds activations; else 0

    def __post_init__(self) -> None:
        whole = ("stride", "chunk_tokens", "largest_chunk_tokens", "max_sweeps", "min_block_tokens", "piece_tokens")
        for name in whole:
            check_whole(getattr(self, name), name, 1)
        for name in ("noise", "noise_rms"):
            check_number(getattr(self, name), name, 0)


# To compare with: a sweep is one parallel pass over the chunk.
JACOBI = SweepOptions(stride=1)

# A tolerance bounds the latent, and the caches with it. Keys are normed and values of order one like the latent, and a
# token averages over many of them; five times the latent's tolerance is what float32 noise allows at 1e-5.
CACHE_TOLERANCE_RATIO = 5.0

CLEAR_CHANGE = 2.0  # the first change is 5 to 8: it stands above the noise of every precision
NOISE_BELOW_RATIOS = 0.15  # of `noise_rms`: root mean squares of 3 times that give ratios, see `ratios`
LARGE_VALUE = 50.0  # from here on, 5e-5 is less than eight units in the last place of float32
SWEEPS_OF_RATIOS = 3  # contraction drifts, so that older ratios say less
# While no block has shown more than one ratio, the margin is the larger one; keys and values vary more than latents.
FIRST_MARGIN, FIRST_MARGIN_CACHE, MARGIN = 4.0, 6.0, 3.0


T = TypeVar("T")
InBlocks = Generator[None, None, T]  # reads something, yields after each block or piece of it, and returns a result


def finish(reading: InBlocks[T]) -> T:
    """Run a reading to its end, and return its result."""
    while True:
        try:
            next(reading)
        except StopIteration as end:
            result: T = end.value
            return result


@dataclass
class RowReading:
    """The result of reading one row."""

    latents: FloatArray  # (n, C) after each token
    logits: FloatArray  # (V) after the last token
    computed: int  # token positions computed
    residual: float  # bound on the latent's error over all positions, max abs; 0 where exact by construction
    fallback: str | None  # why and from where it was finished stepwise


def read_row(
    buffers: StateBuffers, row: int, tokens: IntArray, past: int, tolerance: float | None, options: SweepOptions
) -> InBlocks[RowReading]:
    """Append `tokens` to a row that holds `past` tokens, every latent within `tolerance` of stepwise reading.

    With `tolerance` None they are read stepwise. Leaves `buffers.latent` to the caller.
    """
    latent, computed, residual, fallback = buffers.latent[row].copy(), 0, 0.0, None
    latents: list[FloatArray] = []
    start, end = past, past + len(tokens)
    while start < end:
        chunk = tokens[start - past :][: chunk_size(start, end, options)]
        sweeps = Sweeps(buffers, row, chunk, start, latent, options)
        sweeps.head = start + len(chunk) == end
        if tolerance is None:
            yield from sweeps.finish_stepwise()
        elif not (yield from sweeps.converge(tolerance)):
            fallback = fallback or f"at token {start + sweeps.exact}: the iteration {sweeps.verdict}"
            yield from sweeps.finish_stepwise()
        latents.append(sweeps.latents[1:])
        latent, computed = sweeps.latents[-1], computed + sweeps.computed
        residual, start = max(residual, sweeps.residual), start + len(chunk)
    return RowReading(np.concatenate(latents), sweeps.logits, computed, residual, fallback)


def chunk_size(start: int, end: int, options: SweepOptions) -> int:
    """Return how many of the tokens from `start` to `end` to read together.

    The more exact context a chunk has, the faster it converges: after the start, twice the first chunk, then a quarter
    of the tokens before it, up to `largest_chunk_tokens`. A rest too short for a chunk is divided into equal parts.
    """
    twice = min(2 * min(start, options.chunk_tokens), options.largest_chunk_tokens)
    most = max(options.chunk_tokens, twice, min(start // 4, options.largest_chunk_tokens))
    rest = end - start
    return most if rest - most >= options.chunk_tokens else -(-rest // -(-rest // most))


def read_row_once(
    buffers: StateBuffers, row: int, tokens: IntArray, past: int, options: SweepOptions
) -> InBlocks[RowReading]:
    """Read a row in one parallel pass with zero memory: exact for a model without memory, else not as trained."""
    computed, start, latents = len(tokens), past, []
    for chunk in np.array_split(tokens, -(-len(tokens) // options.largest_chunk_tokens)):
        once = replace(JACOBI, piece_tokens=options.piece_tokens)
        sweeps = Sweeps(buffers, row, chunk, start, buffers.latent[row], once)
        yield from sweeps.read_in_pieces()
        latents.append(sweeps.latents[1:])
        start += len(chunk)
    return RowReading(np.concatenate(latents), sweeps.logits, computed, 0.0, None)


class Sweeps:
    """The iteration over one chunk of one row."""

    def __init__(
        self, buffers: StateBuffers, row: int, tokens: IntArray, start: int, carried: FloatArray, options: SweepOptions
    ) -> None:
        count = len(tokens)
        self.buffers, self.row, self.tokens, self.start, self.options = buffers, row, tokens, start, options
        self.stride = max(1, min(options.stride, count // options.min_block_tokens))
        self.members = [np.arange(first, count, self.stride) for first in range(self.stride)]
        sizes = [len(block) for block in self.members]
        self.slots = [start + offset for offset in itertools.accumulate(sizes, initial=0)]
        # Row i is m for token i, so row i + 1 is what token i leaves: the shift of the recurrence costs no copy.
        self.latents = np.zeros((count + 1, carried.shape[0]), np.float32)  # (T + 1, C)
        self.latents[0] = carried
        self.head = True  # whether the logits after the chunk's last token are wanted
        self.logits: FloatArray = np.zeros(0, np.float32)  # (V), or (0) without head
        self.blocks = self.computed = 0  # blocks and tokens computed so far
        # Of each block against the sweep before, from the second sweep on; the first one's is from nothing.
        self.latent_changes: list[float] = []
        self.cache_changes: list[float] = []
        self.rms_changes: list[float] = []  # of latents, in place of the caches' changes where there is `noise_rms`
        self.residual, self.verdict = math.inf, ""

    @property
    def done(self) -> int:
        """Whole sweeps so far."""
        return self.blocks // self.stride

    @property
    def exact(self) -> int:
        """Leading tokens of the chunk that equal stepwise reading by construction: one more with every block."""
        return min(self.blocks, len(self.tokens))

    def converge(self, tolerance: float) -> InBlocks[bool]:
        """Iterate until the error bound is within tolerance; return False when that is not to be expected.

        The last sweep may be incomplete. After an exception the slots are out of order, see `StateBuffers.reset_order`.
        """
        order = np.concatenate(self.members)
        self.buffers.reorder(self.row, self.start, order, move=False)
        if self.start:
            yield  # it took time to put the slots of the chunk before in order, and to grow caches for this one
        while not (finished := self._within(tolerance)) and not self._hopeless(tolerance):
            yield from self.read_in_pieces()
        self.buffers.reorder(self.row, self.start, order, move=True)
        return finished

    def sweep(self) -> None:
        """Compute every position once."""
        for _ in self.members:
            self.read_block()

    def read_block(self) -> None:
        """Compute the next block."""
        finish(self.read_in_pieces())

    def read_in_pieces(self) -> InBlocks[None]:
        """Compute the next block in equal pieces of at most `piece_tokens`, and yield after each.

        Tokens of a block see only earlier ones of it, so that pieces give what the whole block gives, up to rounding:
        the latents of the block before are replaced when all of it is done. Blocks of the first sweep see only what has
        been computed before them.
        """
        index = self.blocks % self.stride
        members, first, end = self.members[index], self.slots[index], self.slots[index + 1]
        last = members[-1] == len(self.tokens) - 1
        slots = (self.row, first, end)
        noisy = self.options.noise_rms > 0
        compares = self.done and not noisy
        before = {k: v.copy() for k, v in self.buffers.read_slots(*slots).items()} if compares else {}
        latents, at = np.empty((len(members), self.latents.shape[1]), np.float32), 0
        pieces = np.array_split(members, -(-len(members) // self.options.piece_tokens))
        for piece in pieces:
            if at:
                yield
            until = at + len(piece)
            live = self.start + len(self.tokens) if self.done else first + until
            head = bool(last and self.head and until == len(members))
            block = Block(self.row, self.tokens[piece], self.start + piece, first + at, live, self.start, head)
            latents[at:until], logits = self.buffers.read(block, self.latents[piece])
            at = until
        if self.done:
            change = latents - self.latents[members + 1]
            self.latent_changes.append(float(np.abs(change).max()))
            if noisy:
                self.rms_changes.append(float(np.sqrt(np.mean(np.square(change, dtype=np.float64)))))
            else:
                self.cache_changes.append(largest_change(before, self.buffers.read_slots(*slots)))
        self.latents[members + 1] = latents
        if last:
            self.logits = logits.copy()
        self.blocks, self.computed = self.blocks + 1, self.computed + len(members)
        yield

    def finish_stepwise(self) -> InBlocks[None]:
        """Read the positions that are not exact yet token by token, and yield after each. Slots must be in order."""
        for i in range(self.exact, len(self.tokens)):
            at, head = self.start + i, self.head and i == len(self.tokens) - 1
            block = Block(self.row, self.tokens[i : i + 1], np.array([at]), at, at + 1, at, head)
            latents, logits = self.buffers.read(block, self.latents[i : i + 1])
            self.latents[i + 1] = latents[0]
            self.computed += 1
            yield
        self.logits, self.residual = logits.copy(), 0.0

    def _within(self, tolerance: float) -> bool:
        if self.done and self.exact == len(self.tokens):
            self.residual = 0.0
            return True
        stride, noise, noise_rms = self.stride, self.options.noise, self.options.noise_rms
        if noise_rms:
            self.residual = noisy_error_bound(self.latent_changes, self.rms_changes, stride, noise, noise_rms)
            return self.residual <= tolerance
        self.residual = error_bound(self.latent_changes, stride, noise)
        cache = error_bound(self.cache_changes, stride, noise, FIRST_MARGIN_CACHE)
        return self.residual <= tolerance and cache <= CACHE_TOLERANCE_RATIO * tolerance

    def _hopeless(self, tolerance: float) -> bool:
        """Whether the measured contraction cannot reach the tolerance within the allowed sweeps."""
        changes, stride, noise = self.latent_changes, self.stride, self.options.noise
        if changes and not math.isfinite(changes[-1]):
            self.verdict = "produced numbers that are not finite"
            return True
        if len(changes) < 3 * stride or len(changes) % stride:
            return False
        target = tolerance
        if noise_rms := self.options.noise_rms:
            changes, target, noise = above_noise(self.rms_changes, noise_rms), noise_rms, NOISE_BELOW_RATIOS * noise_rms
        sweeps = [max(changes[i : i + stride]) for i in range(0, len(changes), stride)]
        if max(sweeps[-2:]) <= noise:
            self.verdict = f"is down to its noise of {self.options.noise:.0e}, too much for {tolerance:.0e}"
            return True
        q = contraction(sweeps, noise=noise)
        allowed = self.options.max_sweeps - self.done
        if q < 1 and sweeps[-1] * q**allowed <= target:
            return False
        self.verdict = f"contracts by {q:.2f} a sweep, too slowly for {tolerance:.0e}"
        return True


def ratios(changes: Sequence[float], blocks: int, noise: float) -> list[float]:
    """Divide each change by that of one sweep before, where the latter is above rounding noise."""
    pairs = zip(changes, changes[blocks:], strict=False)
    return [b / a for a, b in pairs if a > min(20 * noise, CLEAR_CHANGE)]


def contraction(changes: Sequence[float], blocks: int = 1, noise: float = FLOAT32_RESIDUAL_NOISE) -> float:
    """Estimate the factor by which a sweep shrinks the error: the largest ratio of the last three sweeps.

    `changes` are those of blocks, `blocks` a sweep, each compared with that of the same block one sweep before. Where
    all changes before the last sweep are noise, memory is too weak for a ratio, and 1/2 is on the safe side.
    """
    found = ratios(changes, blocks, noise)[-SWEEPS_OF_RATIOS * blocks :]
    return max(found, default=0.5 if len(changes) > blocks else math.inf)


def error_bound(
    changes: Sequence[float],
    blocks: int = 1,
    noise: float = FLOAT32_RESIDUAL_NOISE,
    first_margin: float = FIRST_MARGIN,
) -> float:
    """Bound the error after the last of several block changes: margin * change * q / (1 - q), plus noise.

    Without a margin this is the geometric series of the changes still to come, `change` being the largest of the last
    sweep. The margin, because q is measured: MARGIN, and `first_margin` while only one sweep has shown q.
    """
    q = contraction(changes, blocks, noise)
    if not q < 1:
        return math.inf
    margin = MARGIN if len(ratios(changes, blocks, noise)) > blocks else first_margin
    return margin * float(np.max(changes[-blocks:])) * q / (1 - q) + noise  # not max, which can lose NaN


def above_noise(rms_changes: Sequence[float], noise_rms: float) -> list[float]:
    """Return what is left of changes, as root mean squares, without the rounding noise that is in each of them."""
    return [
        math.sqrt(max(change**2 - noise_rms**2, 0.0)) if math.isfinite(change) else change for change in rms_changes
    ]


def noisy_error_bound(
    changes: Sequence[float], rms_changes: Sequence[float], blocks: int, noise: float, noise_rms: float
) -> float:
    """Bound the error, max abs, of iterating in a precision that rounds activations; inf until the rest is noise.

    A root mean square over a block varies little, so that it tells a change from `noise_rms` where the largest change,
    of a few outliers, does not. The error to come, change * q / (1 - q) as in `error_bound`, has to be no more than
    `noise_rms`, by which two readings of one prompt differ anyway. The bound scales it to the largest number, by how
    far the changes of the last sweep peak, and adds `noise`. Its margin: of two blocks the larger change counts,
    although the other one has been computed since.
    """
    if len(rms_changes) <= blocks:
        return math.inf
    clear = above_noise(rms_changes, noise_rms)
    q = contraction(clear, blocks, NOISE_BELOW_RATIOS * noise_rms)
    if not q < 1:
        return math.inf
    missing = float(np.max(clear[-blocks:])) * q / (1 - q)
    if not missing <= noise_rms:
        return math.inf
    last = zip(changes[-blocks:], rms_changes[-blocks:], strict=True)
    return missing * max((largest / rms for largest, rms in last if rms), default=0.0) + noise


def largest_change(before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> float:
    """Return the largest difference over all arrays, max abs; overwrites the arrays of `before`.

    In an array with numbers above LARGE_VALUE it is relative to that, because cached values are not normed.
    """
    largest = 0.0
    for name, old in before.items():
        new = after[name]
        change = _largest(np.subtract(new, old, out=old))
        if not change <= largest:  # also where it is NaN; else no scale can make it the largest
            scale = max(1.0, _largest(new) / LARGE_VALUE)
            largest = np.maximum(largest, change / scale)  # unlike max, keeps NaN
    return float(largest)


def _largest(array: NDArray[Any]) -> float:
    """Return the largest absolute value, without an array of absolute values."""
    return float(np.maximum(array.max(initial=0), -array.min(initial=0)))
