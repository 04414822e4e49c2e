"""From one row of logits to one token id, and the log-probabilities of tokens.

A row of logits goes through these steps in turn, in the order of Hugging Face's processors:

1. repetition penalty: logits of tokens in the history are divided by it where positive, multiplied where negative
   (CTRL, arXiv 1909.05858; the rule for negative ones is Hugging Face's);
2. temperature: logits are divided by it; 0 takes the largest logit and ends here;
3. top-k: the k largest logits stay (Fan et al., arXiv 1805.04833);
4. top-p: the smallest set whose probability, relative to the tokens that stayed, reaches p (arXiv 1904.09751);
5. min-p: tokens with at least min_p times the largest probability stay (arXiv 2407.01082);
6. a token is drawn by inverting the cumulative distribution, in the order of token ids, at one uniform number.

Equal logits rank by id, lowest first, so k = 1 and greedy agree. Arithmetic is in float64. The order of ids, not of
ranks, lets two backends whose logits differ in the last bits draw the same token from the same seed, except where the
number falls within those bits of a border. Knows no model, tokenizer or batch: one `Sampler` serves one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.errors import BackendError, InputError
from lrt_deploy.fields import shown

# Both far beyond any use (CTRL's penalty: 1.2), and small enough that no float32 logit leaves float64's range.
MAX_TEMPERATURE = 1e4
MAX_REPETITION_PENALTY = 1e6

_DRAWN_AT_ONCE = 32

_Ids = NDArray[np.intp]
_Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SamplingOptions:
    """Options for choosing the next token; the defaults are greedy.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 switch a step off.
    `seed` None takes fresh entropy from the operating system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        t, p, penalty = self.temperature, self.top_p, self.repetition_penalty
        expected = f"a number from 0 (greedy) to {MAX_TEMPERATURE:g}"
        _require(_is_real(t) and 0 <= t <= MAX_TEMPERATURE, "temperature", t, expected)
        _require(_is_whole(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "a whole number, 0 (off) or more")
        _require(_is_real(p) and 0 < p <= 1, "top_p", p, "a number above 0 and up to 1 (off)")
        _require(_is_real(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "a number from 0 (off) to 1")
        low, high = 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        expected = f"a number from {low:g} to {high:g}, where 1 is off and more discourages repetition"
        _require(_is_real(penalty) and low <= penalty <= high, "repetition_penalty", penalty, expected)
        seed = self.seed
        _require(seed is None or (_is_whole(seed) and seed >= 0), "seed", seed, "a whole number, 0 or more, or None")


class SamplingArguments(TypedDict, total=False):
    """The fields of `SamplingOptions` as keyword arguments, so that type checkers and completion know them."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


class Distribution(NamedTuple):
    """The distribution of the next token: ids in ascending order, and their probabilities, which sum to 1."""

    ids: _Ids
    probabilities: NDArray[np.float64]


class _Drawn(NamedTuple):
    """Random numbers that were drawn together."""

    first: int  # index of the first of them in the stream
    numbers: list[float]
    state: Any  # of the generator after them


class Sampler:
    """Chooses tokens for one sequence from its own stream of random numbers.

    Greedy draws no number, sampling exactly one a token; so a seed gives one stream whatever else runs in the batch.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._random = np.random.Generator(np.random.PCG64(options.seed))
        self._drawn = _Drawn(0, [], self._random.bit_generator.state)
        self._next = 0

    def choose(self, logits: NDArray[np.float32], history: Sequence[int], index: int | None = None) -> int:
        """Pick the next token from logits (V,); `history` is the tokens so far, read only by the repetition penalty.

        `index` is the number of tokens chosen before (default: of calls before). The last token may be chosen again,
        with the same random number, because an interrupt may have come before it was used.
        """
        scores = self._scores(logits, history)
        if self.options.temperature == 0:
            return int(scores.argmax())
        ids, weights = self._kept(scores)
        reached = weights.cumsum()
        index = self._next if index is None else index
        # A number is at most 1 - 2**-53, so the product rounds below the total and the search stays inside.
        token = int(ids[reached.searchsorted(self._number(index) * reached[-1], side="right")])
        self._next = index + 1
        return token

    def distribution(self, logits: NDArray[np.float32], history: Sequence[int]) -> Distribution:
        """Return the distribution that `choose` would draw from, without drawing a random number."""
        scores = self._scores(logits, history)
        if self.options.temperature == 0:
            return Distribution(np.array([scores.argmax()]), np.ones(1))
        ids, weights = self._kept(scores)
        return Distribution(ids, weights / weights.sum())

    def _number(self, index: int) -> float:
        """Return the random number of this index; those of earlier draws are no longer available."""
        if index - self._drawn.first == len(self._drawn.numbers):
            self._random.bit_generator.state = self._drawn.state  # also after an interrupt in the next line
            numbers = self._random.random(_DRAWN_AT_ONCE).tolist()
            self._drawn = _Drawn(index, numbers, self._random.bit_generator.state)
        return self._drawn.numbers[index - self._drawn.first]

    def _scores(self, logits: NDArray[np.float32], history: Sequence[int]) -> _Floats:
        """Apply the repetition penalty; without one, return the logits themselves and not a copy."""
        if logits.ndim != 1 or logits.size == 0:
            raise InputError(f"logits have the shape {logits.shape}, expected (V,): one row of the vocabulary's size")
        if not np.isfinite(logits).all():
            raise BackendError(_describe_non_finite(logits))
        if self.options.repetition_penalty == 1 or len(history) == 0:
            return logits
        return _penalized(logits, history, self.options.repetition_penalty)

    def _kept(self, scores: _Floats) -> tuple[_Ids, NDArray[np.float64]]:
        """Apply temperature, top-k, top-p and min-p; return the ids that stay, ascending, and weights of largest 1.

        Temperature keeps the order, so top-k is applied first, which leaves few numbers.
        """
        options = self.options
        ids: _Ids = np.arange(scores.size)
        if 0 < options.top_k < scores.size:
            ids = _largest(scores, options.top_k)
            scores = scores[ids]
        weights = _softmax_weights(scores, options.temperature)
        if options.top_p < 1:
            kept = _nucleus(scores, weights, options.top_p)
            ids, weights = ids[kept], weights[kept]
        if options.min_p > 0:
            kept = np.flatnonzero(weights >= options.min_p)
            ids, weights = ids[kept], weights[kept]
        return ids, weights


def _penalized(logits: NDArray[np.float32], history: Sequence[int], penalty: float) -> NDArray[np.float64]:
    """Return a copy where each token of the history is penalized once, however often it occurs."""
    seen = np.asarray(history, dtype=np.int64)
    if seen.min() < 0 or seen.max() >= logits.size:
        wrong = int(seen[(seen < 0) | (seen >= logits.size)][0])
        raise InputError(f"history holds the token id {wrong}, expected ids from 0 to {logits.size - 1}")
    scores = logits.astype(np.float64)
    before = scores[seen]
    scores[seen] = np.where(before > 0, before / penalty, before * penalty)
    return scores


def _softmax_weights(scores: _Floats, temperature: float) -> NDArray[np.float64]:
    """Compute exp((score - largest) / temperature): probabilities up to a common factor."""
    shifted = scores.astype(np.float64)
    shifted -= shifted.max()
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose weight is 0
        shifted /= temperature
    return np.exp(shifted, out=shifted)


def _largest(scores: _Floats, count: int) -> _Ids:
    """Return positions of the `count` largest scores, ascending; of equal scores at the border the lowest stay."""
    border = np.partition(scores, scores.size - count)[scores.size - count]
    kept = np.flatnonzero(scores >= border)
    surplus = kept.size - count
    if surplus:
        level = np.flatnonzero(scores[kept] == border)
        kept = np.delete(kept, level[-surplus:])
    return kept


def _nucleus(scores: _Floats, weights: NDArray[np.float64], p: float) -> _Ids:
    """Return positions, ascending, of the fewest largest scores whose weights reach the share p; at least one.

    Only weights of at least the share (1 - p) / V are sorted: the others, fewer than V, sum to less than 1 - p, so the
    sorted ones reach p without them.
    """
    total = weights.sum()
    candidates = np.sort(weights[weights >= (1 - p) * total / weights.size])[::-1]
    count = int(candidates.cumsum().searchsorted(p * total)) + 1
    return _largest(scores, min(count, candidates.size))


def _describe_non_finite(logits: _Floats) -> str:
    wrong = np.flatnonzero(~np.isfinite(logits))
    shown = ", ".join(f"{logits[i]} for token {i}" for i in wrong[:5])
    more = f" and {wrong.size - 5} more" if wrong.size > 5 else ""
    return (
        f"{wrong.size} of {logits.size} logits are not finite: {shown}{more}; no token can be chosen from them. "
        "Half precision overflows first: try fp32, and compare the two with `lrt-deploy parity`"
    )


def log_probabilities(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the log-probability of one token (B) in each row of logits (B, V), in float64."""
    wide = logits.astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    total = np.log(np.exp(wide - largest).sum(axis=-1)) + largest[:, 0]
    chosen: NDArray[np.float64] = np.take_along_axis(wide, tokens[:, None], axis=-1)[:, 0] - total
    return chosen


def log_normalizers(logits: NDArray[np.float32]) -> list[float]:
    """Compute log-sum-exp (B) of logits (B, V) in float32; a token's logit minus it is its log-probability.

    Faster than `log_probabilities`, because every generated token waits for it. Graphs cap their logits at
    `LOGIT_SOFTCAP`, so exponentials neither overflow nor vanish, and the largest logit need not be subtracted.
    """
    normalizers: list[float] = np.log(np.exp(logits).sum(axis=-1)).tolist()
    return normalizers


def _is_real(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise InputError(f"sampling option {name} is {shown(found)}, expected {expected}")
