"""A loaded bundle: reads prompts, advances states, generates and scores tokens. No torch.

A token goes from `Decoder.step` (checks the ids) to `DecodeState.advance` (state.py: transaction, positions, rows), to
`decode` of the state's buffers (backends/, for instance ort_cpu.py: runs the graph on caches and latent in place), and
its logits come back by way of `check_finite` (backends/base.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import numpy as np

from lrt_deploy.bundle.manifest import MANIFEST, TOKENIZER, Manifest, hash_file, read_manifest, verify_files
from lrt_deploy.errors import BackendError, InputError, StateError
from lrt_deploy.fields import LARGEST_COUNT, check_flag, check_is, check_path, check_text, check_whole
from lrt_deploy.runtime.backends.base import Backend, check_finite
from lrt_deploy.runtime.backends.cuda import CudaDevice
from lrt_deploy.runtime.opening import choose
from lrt_deploy.text.chat_template import TEMPLATE_FILE
from lrt_deploy.text.grammar import Grammar
from lrt_deploy.text.prompts import check_prompts, check_tokens
from lrt_deploy.text.tokenizer import Tokenizer
from lrt_deploy.types import FloatArray, IntArray, PrefillPolicy

from .device_loop.ahead import Ahead, start_ahead
from .fixed_point import InBlocks, finish
from .generation import Continuation, Event, Generation
from .opening import check_contract, check_threads, limit_batch, limit_capacity, load_backend
from .prefill import Place, PrefillOptions, PrefillRequest, read_prompts, resolve, reused, shared_tokens
from .sampling import SamplingArguments, log_normalizers, top_logprobs
from .state import Content, DecodeState, Reading
from .state_file import ModelFingerprint, Owner


class Decoder:
    """Stateful decoding with one precision of a bundle on one backend. Use it in a `with` block, or call `close`."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        tokenizer: Tokenizer | None,
        prefill_options: PrefillOptions | None = None,
        bundle_sha256: str = "",
    ) -> None:
        self.manifest, self.tokenizer, self.config = manifest, tokenizer, manifest.model
        self.max_seq_len = manifest.max_seq_len  # tokens that a sequence can hold
        self._backend: Backend | None = backend
        self.fingerprint = ModelFingerprint.of(backend, manifest, bundle_sha256)
        self._owner: Owner | None = Owner(
            backend, self.config, manifest.max_batch_size, self.max_seq_len, self.fingerprint
        )
        # The backend's name, what it is made of (for people), and the precision of weights and graphs that run.
        self.backend, self.backend_detail, self.precision = backend.name, backend.detail, backend.precision
        self.backend_reason = "given"  # why this backend runs, for people; `open_decoder` knows
        self.device: CudaDevice | None = backend.device  # the GPU that holds the weights; None: they are in host memory
        # The CPU threads that the backend was given; None where it decides itself, or runs on a GPU.
        self.threads: int | None = getattr(backend, "threads", None)
        self.prefill_options = prefill_options or PrefillOptions()

    @property
    def prefill_options(self) -> PrefillOptions:
        """How prompts are read, with every default resolved."""
        return self._prefill_options

    @prefill_options.setter
    def prefill_options(self, options: PrefillOptions) -> None:
        self._prefill_options = resolve(options.clamp(self._live.backend.blocks), self.config, self.precision)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        state: DecodeState | None = None,
        policy: PrefillPolicy = "auto",
        tolerance: float | None = None,
        reuse: bool = False,
    ) -> DecodeState:
        """Read one prompt per sequence; rows may differ in length. Starts a state, or continues `state` in place.

        With `reuse`, the prompts are whole sequences: `state` is cut to the tokens that it shares with them, and only
        the rest is read.

        `policy`: `stepwise` is exact; `fixed-point` iterates until every latent's estimated error is within `tolerance`
        of that (max abs; None: the default of `tolerances`), or finishes exactly; `auto` takes one of the two by the
        length of each prompt; `zero` is one pass with zero memory, which is not the model as trained. `state.prefill`
        reports. Raises InputError for an empty prompt, ids outside the vocabulary, an unknown policy or tolerance,
        StateError for a prompt beyond the capacity.
        """
        request = PrefillRequest.of(policy, tolerance, self.config.memory, self.precision)
        check_flag(reuse, "reuse")
        state, reading = self.reading(prompts, state, request, reuse)
        return state.commit(finish(reading), state)

    def reading(
        self,
        prompts: Sequence[Sequence[int]],
        state: DecodeState | None,
        request: PrefillRequest,
        reuse: bool,
        piece_tokens: int = LARGEST_COUNT,
    ) -> tuple[DecodeState, InBlocks[Content]]:
        """Return the state of `prefill`, and the reading in blocks, whose result is to be committed to the state.

        Blocks are computed in pieces of at most `piece_tokens`.
        """
        kept = self.prefill_options
        options = dataclasses.replace(kept, sweeps=dataclasses.replace(kept.sweeps, piece_tokens=piece_tokens))
        rows = check_prompts(prompts, self.config.vocab_size)
        if state is None:
            self._check_rows(len(rows), "prompts were given")
            state = DecodeState(self._live, len(rows), len(rows))
        elif len(rows) != check_is(state, DecodeState, "state").batch:
            raise InputError(
                f"{len(rows)} prompt(s) were given for a state of {state.batch} sequence(s); expected one each"
            )
        self._check(state, [len(row) for row in rows], again=reuse)
        if not reuse:
            past = state.row_lengths
            return state, state.read(past, rows, lambda: self._read(state, past, rows, (request, options)))
        within = state.read_within
        shared = shared_tokens(state.tokens, rows, within, request)
        rest = [row[count:] for row, count in zip(rows, shared, strict=True)]
        if any(map(len, rest)):
            run = lambda: self._read(state, shared, rest, (request, options))  # noqa: E731
            return state, state.read(shared, rest, run, lambda report: reused(report, shared, rows, within))
        found = dataclasses.replace(state.prefill, passes=0.0, note=None)
        return state, state.read(shared, rest, None, lambda _: reused(found, shared, rows, within))

    def _read(
        self,
        state: DecodeState,
        past: Sequence[int],
        rows: Sequence[IntArray],
        how: tuple[PrefillRequest, PrefillOptions],
    ) -> InBlocks[Reading]:
        """Read `rows` after the first `past` (B) tokens of a state, and refuse logits that are not finite."""
        place = Place(state.buffers, past, self.config.memory)
        reading = yield from read_prompts(place, rows, *how)
        last = [start + len(row) - 1 for start, row in zip(past, rows, strict=True)]
        check_finite(reading.logits, last, state.owner.backend)
        return reading

    def step(self, state: DecodeState, tokens: Sequence[int] | IntArray) -> FloatArray:
        """Append one token to each sequence, in place; returns the logits (B, V) of the next."""
        if not isinstance(state, DecodeState):
            check_is(state, DecodeState, "state")  # raises
        ids = check_tokens(tokens, self.config.vocab_size, state.batch)
        return self.advance(state, ids, give=True)

    def advance(self, state: DecodeState, ids: IntArray, give: bool = False) -> FloatArray:
        """Do the same for ids (B) that were checked; unless `give`, the logits belong to the state."""
        if state.owner.backend is not self._backend or not state.has_room:
            self._check(state, [1] * state.batch)  # says what is wrong
        return state.advance(ids, give)

    def check_own(self, state: DecodeState) -> None:
        """Raise StateError unless the state is of this decoder and has rows."""
        if state.owner.backend is not self._live.backend:
            raise StateError("this state was made by another decoder; a state belongs to the decoder that made it")
        if state.batch == 0:
            raise StateError("this state has no rows; add one first")

    def load_state(self, path: str | Path) -> DecodeState:
        """Load a state that `DecodeState.save` wrote, here or in another process; it continues to the bit.

        Raises StateError for a file that is damaged, of a later format, or of another model or precision.
        """
        return DecodeState.load(check_path(path, "path"), self._live)

    def adopt(self, state: DecodeState) -> DecodeState:
        """Copy another decoder's state, to be continued here: same model and precision, any backend."""
        return check_is(state, DecodeState, "state").rows(range(state.batch), self._live)

    def new_state(self, slots: int) -> DecodeState:
        """Make a state without rows that has room for `slots`; see `DecodeState.add`."""
        self._check_rows(check_whole(slots, "slots"))
        return DecodeState(self._live, slots)

    def generate(
        self,
        prompt: str | Sequence[int] | None,
        max_new_tokens: int = 64,
        *,
        state: DecodeState | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        policy: PrefillPolicy = "auto",
        tolerance: float | None = None,
        reuse: bool = False,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> Iterator[Event]:
        """Continue a prompt (text, or token ids taken as they are), yielding one event per token as it is chosen.

        `state` continues an existing state of one sequence; without a prompt (None) from where it stands, with `reuse`
        as in `prefill`. Whenever an event has been yielded, the state holds its token, whatever happens next; only the
        token of the finish reason `capacity` has no room in it. `stop_ids` None: `<|assistant_end|>` and `<|bos|>`.
        `logprobs` is how many of the likeliest tokens each event lists. The text of an answer that ends with the finish
        reason `stop_token` or `grammar` matches `grammar` as a whole. Sampling options are the fields of
        `SamplingOptions`. Random numbers start again with each call: with one seed, two calls draw the same numbers.
        """
        check_whole(max_new_tokens, "max_new_tokens", 1)
        vocabulary = (self.tokenizer, self.config.vocab_size)
        options = Generation.of(vocabulary, max_new_tokens, (stop_ids, stop_strings), logprobs, sampling, grammar)
        check_flag(reuse, "reuse")
        if state is not None:
            check_is(state, DecodeState, "state")
        PrefillRequest.of(policy, tolerance, self.config.memory, self.precision)  # checks them before the first event
        ids = None if prompt is None else self.prompt_ids(prompt)

        def start() -> DecodeState:
            if ids is not None:
                again = reuse and state is not None
                return self.prefill([ids], state=state, policy=policy, tolerance=tolerance, reuse=again)
            if state is None or state.batch != 1:
                raise InputError("without a prompt there must be a state of one sequence to continue")
            return state

        return self._generate(options, start, reads=ids is not None)

    def _generate(self, options: Generation, start: Callable[[], DecodeState], reads: bool) -> Iterator[Event]:
        """Get the state from `start`, then yield events until something stops it.

        After an exception before the first event, a prompt that `start` has read (`reads`) is taken back.
        """
        state = undo = continuation = None
        try:
            state = start()
            undo = state.undo
            continuation = Continuation(options, state.tokens[0])
            reason = None
            while reason is None:
                self.check_own(state)
                ahead = self._ahead_of(state, continuation)
                chosen = ahead.next(state) if ahead is not None else None
                if chosen is None:
                    logits = state.row_logits(0)  # (V)
                    full = state.row_lengths[0] == state.capacity
                    token, normalizer = continuation.choose(logits), log_normalizers(logits[None])[0]
                    logprob, more = logits.item(token) - normalizer, options.logprobs
                    top = top_logprobs(logits[: options.choices], normalizer, more) if more else ()
                else:
                    token, logprob, top, full = chosen
                event = continuation.take(token, logprob, top, state.prefill, full)
                reason = event.finish_reason
                if reason is not None and ahead is not None and state.ahead is ahead:
                    state.follow((), None)
                    state.ready()
                yield continuation.emit(state, event, full)
        except BaseException:
            if reads and state is not None and not (continuation and continuation.emitted):
                state.roll_back(undo or state.undo)
            raise

    def _ahead_of(self, state: DecodeState, continuation: Continuation) -> Ahead | None:
        """Return the loop on the device that continues a state; None where the host chooses the next token."""
        if self.device is None or not continuation.made:
            return None
        if isinstance(state.ahead, Ahead) and state.ahead.continuation is continuation:
            return state.ahead
        return start_ahead(self._live.backend, state, continuation)

    def close(self) -> None:
        """Release the weights; they stay in memory while a state of this decoder is alive."""
        self._backend = self._owner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(self, rows: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Return the log-probabilities of each row's tokens after its first: an array (T - 1) for a row of T token ids.

        Natural logarithms, float32, of the model's own logits, before temperature, penalty and cuts. Rows are read
        stepwise from an empty state, any number of them and of any lengths; as many as the bundle allows run together.
        Raises InputError for a row that is empty, has ids outside the vocabulary or does not fit the capacity.
        """
        checked = check_prompts(rows, self.config.vocab_size)
        for index, row in enumerate(checked):
            if len(row) - 1 > self.max_seq_len:
                raise InputError(
                    f"row {index} has {len(row)} tokens; a capacity of {self.max_seq_len} scores at most "
                    f"{self.max_seq_len + 1}"
                )
        found = [np.zeros(len(row) - 1, np.float32) for row in checked]
        order = sorted(range(len(checked)), key=lambda index: -len(checked[index]))  # so that the last rows end first
        for start in range(0, len(order), self.manifest.max_batch_size):
            chosen = order[start : start + self.manifest.max_batch_size]
            longest = len(checked[chosen[0]])
            state = self.prefill([checked[index][:1].tolist() for index in chosen], policy="stepwise")
            for at in range(1, longest):
                while len(checked[chosen[-1]]) <= at:
                    state.drop(len(chosen) - 1)
                    chosen.pop()
                tokens, logits = np.array([checked[index][at] for index in chosen]), state.logits  # (B), (B, V)
                scores = logits[range(len(chosen)), tokens] - log_normalizers(logits)
                for index, score in zip(chosen, scores, strict=True):
                    found[index][at - 1] = score
                if at < longest - 1:
                    self.advance(state, tokens)
        return found

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Return token ids as given, or those of a text with `<|bos|>` in front, checked."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError(
                    "this bundle has no tokenizer, so the prompt must be token ids; export with --tokenizer to add one"
                )
            prompt = self.tokenizer.encode_prompt(prompt, self.max_seq_len)
        ids: list[int] = check_prompts([prompt], self.config.vocab_size)[0].tolist()
        return ids

    @property
    def _live(self) -> Owner:
        if self._owner is None:
            raise BackendError("this decoder is closed; open the bundle again")
        return self._owner

    def _check_rows(self, rows: int, what: str = "slots were asked for") -> None:
        if not 1 <= rows <= self.manifest.max_batch_size:
            limit = self.manifest.max_batch_size
            raise InputError(f"{rows} {what}; expected 1 to {limit}, the max_batch_size of the bundle or its engine")

    def _check(self, state: DecodeState, more: Sequence[int], again: bool = False) -> None:
        """Check that the state is of this decoder and each row has room for `more` tokens; `again`: for them alone."""
        self.check_own(state)
        lengths = [0] * len(more) if again else state.row_lengths
        for row, (length, count) in enumerate(zip(lengths, more, strict=True)):
            if length + count > state.capacity:
                raise StateError(
                    f"sequence {row} has {count} tokens, more than its capacity of {state.capacity}; shorten it, or "
                    "export with a larger --max-seq-len"
                    if not length
                    else f"sequence {row} holds {length} tokens and {count} more do not fit its capacity of "
                    f"{state.capacity}; export with a larger --max-seq-len, or start a new state"
                )


def open_decoder(
    bundle: str | Path,
    backend: str = "ort-cpu",
    precision: str | None = None,
    *,
    threads: int | None = None,
    max_seq_len: int | None = None,
    verify: bool = False,
    prefill_options: PrefillOptions | None = None,
    cuda_graph: bool = True,
    device_loop: bool = True,
) -> Decoder:
    """Open a bundle for decoding; `precision` None takes the only or most precise one that the backend can run.

    `max_seq_len` lowers the capacity, and with it the memory of every state. `verify` hashes all files again.
    `prefill_options` pins how prompts are read: the length from which `auto` iterates, strides and chunks.
    `cuda_graph` False keeps a TensorRT backend from running its decode step as a CUDA graph, `device_loop` False any
    GPU from choosing the tokens of `generate`: the host does.
    Raises BundleError for a bundle that is not intact, BackendError for a backend that is not there, EngineError for
    an engine that is not there or must not be used here.
    """
    folder = check_path(bundle, "bundle")
    check_text(backend, "backend")
    if precision is not None:
        check_text(precision, "precision")
    if prefill_options is not None:
        check_is(prefill_options, PrefillOptions, "prefill_options")
    check_flag(verify, "verify")
    check_flag(cuda_graph, "cuda_graph")
    check_flag(device_loop, "device_loop")
    manifest = limit_capacity(read_manifest(folder), max_seq_len)
    verify_files(folder, manifest, force=verify)
    choice = choose(folder, manifest, backend, precision)
    check_contract(folder, manifest, choice.precision)
    manifest = limit_batch(folder, manifest, choice)
    check_threads(threads)
    tokenizer = None
    if manifest.tokenizer_tokens:
        template = f"{TOKENIZER}/{TEMPLATE_FILE}" in manifest.files
        tokenizer = Tokenizer.open(folder / TOKENIZER, manifest.tokenizer_tokens, template)
    loaded = load_backend(choice, folder, manifest, threads, cuda_graph, device_loop)
    decoder = Decoder(manifest, loaded, tokenizer, prefill_options, hash_file(folder / MANIFEST))
    decoder.backend_reason = choice.reason
    return decoder
