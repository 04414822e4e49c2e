"""From one row of logits to one token id, and the log-probabilities of tokens.

A row of logits goes through these steps in turn, in the order of Hugging Face's processors:

1. repetition penalty: logits of tokens in the history are divided by it where positive, multiplied where negative
   (CTRL, arXiv 1909.05858; the rule for negative ones is Hugging Face's);
2. frequency and presence penalty: for each token chosen so far, the first times its count and once the second are
   subtracted from its logit (OpenAI's API reference); the prompt does not count;
3. logit bias: added to the logits of the named tokens;
4. temperature: logits are divided by it; 0 takes the largest logit and ends here;
5. top-k: the k largest logits stay (Fan et al., arXiv 1805.04833);
6. top-p: the smallest set whose probability, relative to the tokens that stayed, reaches p (arXiv 1904.09751);
7. min-p: tokens with at least min_p times the largest probability stay (arXiv 2407.01082);
8. a token is drawn by inverting the cumulative distribution, in the order of token ids, at one uniform number.

Equal logits rank by id, lowest first, so k = 1 and greedy agree. Arithmetic is in float64. The order of ids, not of
ranks, lets two backends whose logits differ in the last bits draw the same token from the same seed, except where the
number falls within those bits of a border.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from lrt_deploy.fields import check_number, check_whole, refuse

# Both far beyond any use (CTRL's penalty: 1.2), and small enough that no float32 logit leaves float64's range.
MAX_TEMPERATURE = 1e4
MAX_REPETITION_PENALTY = 1e6
MAX_BIAS = 1e4  # of frequency and presence penalty and of the logit bias; logits are capped to 15

_DRAWN_AT_ONCE = 32

_Ids = NDArray[np.intp]
_Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SamplingOptions:
    """Options for choosing the next token; the defaults are greedy.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1, `frequency_penalty` and
    `presence_penalty` 0 and an empty `logit_bias` (from token ids to what is added) switch a step off. `seed` None
    takes fresh entropy from the operating system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = "sampling option "
        check_number(self.temperature, f"{name}temperature", 0, MAX_TEMPERATURE)
        check_whole(self.top_k, f"{name}top_k", 0, math.inf)
        if check_number(self.top_p, f"{name}top_p", 0, 1) == 0:
            refuse(self.top_p, f"{name}top_p", "a number above 0 and up to 1 (off)")
        check_number(self.min_p, f"{name}min_p", 0, 1)
        low, high = 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        check_number(self.repetition_penalty, f"{name}repetition_penalty", low, high)
        if self.seed is not None:
            check_whole(self.seed, f"{name}seed", 0, math.inf)
        check_number(self.frequency_penalty, f"{name}frequency_penalty", -MAX_BIAS, MAX_BIAS)
        check_number(self.presence_penalty, f"{name}presence_penalty", -MAX_BIAS, MAX_BIAS)
        if not isinstance(self.logit_bias, Mapping):
            refuse(self.logit_bias, f"{name}logit_bias", "a mapping from token ids to numbers")
        for token, bias in self.logit_bias.items():
            check_whole(token, f"{name}logit_bias: a token id")
            check_number(bias, f"{name}logit_bias[{token}]", -MAX_BIAS, MAX_BIAS)

    @property
    def change_logits(self) -> bool:
        """Whether logits are changed before temperature."""
        counted = self.frequency_penalty or self.presence_penalty or self.logit_bias
        return bool(counted) or self.repetition_penalty != 1


class SamplingArguments(TypedDict, total=False):
    """The fields of `SamplingOptions` as keyword arguments, so that type checkers and completion know them."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]


class TokenLogprob(NamedTuple):
    """A token id and its natural log-probability."""

    token: int
    logprob: float


class Sampler:
    """Chooses tokens for one sequence from its own stream of random numbers.

    The i-th token takes the i-th number of the seed's stream, whatever else runs in the batch; greedy takes none.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._drawn: tuple[int, list[float]] = (-1, [])  # numbers drawn together: index of the first / size, numbers

    @cached_property
    def _start(self) -> Any:  # noqa: ANN401 - as NumPy has it
        """The state of PCG64 before the first number; not made for greedy, which needs no entropy."""
        return np.random.PCG64(self.options.seed).state

    @property
    def start(self) -> tuple[int, int]:
        """State and increment of PCG64 before the first number, 128 bits each."""
        found = self._start["state"]
        return int(found["state"]), int(found["inc"])

    def choose(
        self, logits: NDArray[np.float32], history: Sequence[int], index: int, allowed: _Ids | None = None
    ) -> int:
        """Choose token number `index` from finite logits (V) of the tokens that may be chosen.

        `history` is all tokens so far, of which the last `index` were chosen; penalties read it. `allowed` are the ids,
        ascending, that a grammar leaves: the others are taken out after step 3, so that top-p counts what is left.
        """
        scores = self._changed(logits, history, index) if self.options.change_logits else logits
        if allowed is not None:
            return int(allowed[self._choose(scores[allowed], index)])
        return self._choose(scores, index)

    def _choose(self, scores: _Floats, index: int) -> int:
        if self.options.temperature == 0:
            return int(scores.argmax())
        ids, weights = self._kept(scores)
        reached = weights.cumsum()
        # A number is at most 1 - 2**-53, so the product rounds below the total and the search stays inside.
        return int(ids[reached.searchsorted(self._number(index) * reached[-1], side="right")])

    def _number(self, index: int) -> float:
        """Return one number of the stream, from 0 to below 1."""
        part, place = divmod(index, _DRAWN_AT_ONCE)
        if part != self._drawn[0]:
            bits = np.random.PCG64(0)
            bits.state = self._start
            bits.advance(part * _DRAWN_AT_ONCE)
            self._drawn = part, np.random.Generator(bits).random(_DRAWN_AT_ONCE).tolist()
        return self._drawn[1][place]

    def _changed(self, logits: NDArray[np.float32], history: Sequence[int], index: int) -> NDArray[np.float64]:
        """Return a copy of the logits with penalties and bias; ids beyond the logits count for nothing."""
        options, scores = self.options, logits.astype(np.float64)
        tokens = np.asarray(history, dtype=np.int64)
        chosen, tokens = tokens[len(tokens) - index :], tokens[tokens < scores.size]
        if options.repetition_penalty != 1:
            before = scores[tokens]
            scores[tokens] = np.where(
                before > 0, before / options.repetition_penalty, before * options.repetition_penalty
            )
        if options.frequency_penalty or options.presence_penalty:
            found, counts = np.unique(chosen[chosen < scores.size], return_counts=True)
            scores[found] -= options.frequency_penalty * counts + options.presence_penalty
        for token, bias in options.logit_bias.items():
            if token < scores.size:
                scores[token] += bias
        return scores

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


def _softmax_weights(scores: _Floats, temperature: float) -> NDArray[np.float64]:
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


def log_normalizers(logits: NDArray[np.float32]) -> list[float]:
    """Compute log-sum-exp (B) of logits (B, V) in float32; a token's logit minus it is its log-probability.

    In float32 because every generated token waits for it: the sums are within 1e-5 of those in float64. Graphs cap
    their logits at `LOGIT_SOFTCAP`, so exponentials neither overflow nor vanish, and the largest logit need not be
    subtracted.
    """
    normalizers: list[float] = np.log(np.exp(logits).sum(axis=-1)).tolist()
    return normalizers


def top_logprobs(logits: NDArray[np.float32], normalizer: float, count: int) -> tuple[TokenLogprob, ...]:
    """Return the `count` likeliest tokens of logits (V), the likeliest first, of equal ones the lowest id."""
    ids = _largest(logits, min(count, logits.size))
    ranked = ids[np.argsort(-logits[ids], kind="stable")].tolist()
    return tuple(TokenLogprob(token, logits.item(token) - normalizer) for token in ranked)
