"""`generate` where the GPU chooses the tokens: the same tokens, text, log-probabilities and states as on ort-cpu.

No GPU is here. The loop's code runs on the strict fake of TensorRT and CUDA, and with ONNX Runtime on the host by
address; the kernels are compiled by g++ (see `test_selection_kernel`).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import CUresult, FakeDriver
from fake_tensorrt import GPU, fake_library, put_engine

from lrt_deploy.bundle.manifest import read_manifest
from lrt_deploy.errors import BackendError, NonFiniteError
from lrt_deploy.runtime.backends.cuda import CudaDevice
from lrt_deploy.runtime.backends.host_tables import HostTables
from lrt_deploy.runtime.backends.ort_cuda import OrtCudaBackend
from lrt_deploy.runtime.backends.tensorrt import TensorRTBackend, open_engine
from lrt_deploy.runtime.decoder import Decoder
from lrt_deploy.runtime.device_loop.rows import LoopRows
from lrt_deploy.runtime.generation import Continuation, Generation
from lrt_deploy.text.grammar import Grammar

GOLDEN = "mr_gqa_SSSL"
PROMPT = [5, 9, 2, 77, 31, 200, 4]
SEEDS, TOKENS = 100, 8
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": {7: 2.0}}


class Loops:
    """Decoders of a bundle whose tokens are chosen on the device."""

    def __init__(self, folder, patch):
        self.folder, self.patch, self.manifest, self.drivers = folder, patch, read_manifest(folder), []

    def decoder(self, backend, tokenizer):
        return Decoder(self.manifest, backend, tokenizer)

    def strict(self, tokenizer=None, seed=3, cuda_graph=True):
        driver = FakeDriver(seed)
        self.drivers.append(driver)
        self.patch.setitem(sys.modules, "cuda.bindings.driver", driver)
        self.patch.setitem(sys.modules, "tensorrt_rtx", fake_library(self.folder, driver))
        engine = open_engine(self.folder, self.manifest, "tensorrt-rtx", "fp32", GPU)
        tables = HostTables.open(self.folder, self.manifest, "fp32")
        backend = TensorRTBackend(engine, CudaDevice(), self.manifest, cuda_graph, tables)
        return self.decoder(backend, tokenizer)

    def strict_without_graph(self, tokenizer=None):
        return self.strict(tokenizer, cuda_graph=False)

    def onnx_runtime(self, tokenizer=None):
        self.drivers.append(FakeDriver(eager=True))
        self.patch.setitem(sys.modules, "cuda.bindings.driver", self.drivers[-1])
        backend = OrtCudaBackend(self.folder, self.manifest, "fp32", CudaDevice(), kind="cpu")
        return self.decoder(backend, tokenizer)


EXECUTIONS = ("strict", "strict_without_graph", "onnx_runtime")


@pytest.fixture
def loops_of(tmp_path, monkeypatch):
    made = []

    def loops(exported):
        folder = shutil.copytree(exported, tmp_path / f"bundle{len(made)}")
        put_engine(folder)
        made.append(Loops(folder, monkeypatch))
        return made[-1]

    yield loops
    assert [driver.violations for one in made for driver in one.drivers if driver.violations] == []


@pytest.fixture
def loops(loops_of, export_once):
    return loops_of(export_once(GOLDEN))


def tokens_of(decoder, prompt=PROMPT, count=TOKENS, **options):
    return [event.token for event in decoder.generate(prompt, count, policy="stepwise", **options)]


def on_host(decoder, run):
    """What the host gives that chooses from the same backend's logits."""
    decoder._backend.loops = False
    try:
        return run(decoder)
    finally:
        decoder._backend.loops = True


def steps_of(decoder):
    """Steps that loops have enqueued."""
    pool = decoder._backend.loop_pool
    return sum(loop.started for loop in pool._free) if pool else 0


# Tokens


@pytest.mark.parametrize(("execution", "seeds"), [("strict", SEEDS // 10), ("onnx_runtime", SEEDS)])
def test_tokens_are_those_of_ort_cpu(loops_of, export_once, decoder_of, golden, execution, seeds):
    """Greedy, and sampled with many seeds. Where two backends' logits differ in the last bits a draw may too."""
    reference, decoder = decoder_of(golden.name), getattr(loops_of(export_once(golden.name)), execution)()
    prompt, differ = golden.ids[0, :3].tolist(), 0
    assert tokens_of(decoder, prompt, 40) == tokens_of(reference, prompt, 40, stop_ids=())
    for seed in range(seeds):
        options = {**SAMPLED, **(PENALTIES if seed % 2 else {}), "seed": seed, "stop_ids": ()}
        differ += tokens_of(decoder, prompt, **options) != tokens_of(reference, prompt, **options)
    assert differ <= 1
    assert steps_of(decoder) >= 39


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_log_probabilities_and_alternatives_are_those_of_the_host(loops, execution):
    decoder = getattr(loops, execution)()
    for logprobs in (None, 3):
        run = lambda one: list(one.generate(PROMPT, 12, seed=1, logprobs=logprobs, **SAMPLED))  # noqa: B023, E731
        found, expected = run(decoder), on_host(decoder, run)
        assert found == expected
        np.testing.assert_allclose([e.logprob for e in found], [e.logprob for e in expected], atol=2e-5)
        assert [e.top_logprobs for e in found] == [e.top_logprobs for e in expected]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_with_tables_on_the_host_rows_are_gathered_on_the_device(loops_of, host_embeddings_once, execution):
    decoder = getattr(loops_of(host_embeddings_once(GOLDEN)), execution)()
    run = lambda one: [tokens_of(one), tokens_of(one, seed=3, **SAMPLED)]  # noqa: E731
    assert run(decoder) == on_host(decoder, run)
    assert steps_of(decoder)


def test_a_model_without_memory_runs_too(loops_of, export_once):
    decoder = loops_of(export_once("baseline_ve")).strict()
    run = lambda one: [tokens_of(one), tokens_of(one, seed=3, **SAMPLED)]  # noqa: E731
    assert run(decoder) == on_host(decoder, run)
    assert steps_of(decoder)


@pytest.mark.parametrize("execution", ["strict", "onnx_runtime"])
def test_text_stop_strings_and_grammars_end_where_the_host_ends(loops_of, export_once, decoder_of, execution):
    reference = decoder_of("demo")
    decoder = getattr(loops_of(export_once("demo")), execution)(reference.tokenizer)
    text = "".join(event.text for event in reference.generate("Once upon a time", 24))
    stop = text[len(text) // 2 :][:4]
    for options in (
        {},
        {"stop_strings": [stop]},
        {"stop_ids": [next(iter(reference.generate("Once upon a time", 1))).token]},
        {"grammar": Grammar.regex("[a-z]{3,5} [0-9]+")},
        {"grammar": Grammar.regex("[a-z]{3,5} [0-9]+"), "temperature": 1.0, "seed": 5, "logprobs": 2},
    ):
        run = lambda one: list(one.generate("Once upon a time", 24, policy="stepwise", **options))  # noqa: B023, E731
        found, expected = run(decoder), run(reference)
        assert [(e.token, e.text, e.finish_reason, e.stop) for e in found] == [
            (e.token, e.text, e.finish_reason, e.stop) for e in expected
        ]
    assert steps_of(decoder)


def test_a_full_state_ends_it(loops):
    decoder = loops.strict()
    run = lambda one: list(one.generate(PROMPT * 17, 99, policy="stepwise"))  # noqa: E731
    found = run(decoder)
    assert found == on_host(decoder, run)
    assert found[-1].finish_reason == "capacity"


# States


def seen(state):
    """All that a state shows."""
    latent = b"" if state.latent is None else state.latent.tobytes()
    length = int(state.lengths.min())
    caches = [part[:, :, :length].tobytes() for layer in range(2) for part in state.cache(layer)]
    return [state.tokens, state.logits.tobytes(), latent, caches]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("act", ["nothing", "look", "fork", "save", "rewind", "step", "cancel"])
def test_a_state_that_is_used_in_the_middle_is_what_it_is_on_the_host(loops, tmp_path, execution, act):
    """After each event in turn, to the bit; generation then goes on."""
    decoder = getattr(loops, execution)()

    def run(one):
        found = []
        for after in (1, 2, 5, 8):
            state = one.prefill([PROMPT], policy="stepwise")
            for count, event in enumerate(one.generate(None, TOKENS, state=state, seed=after, **SAMPLED), 1):
                found.append((event.token, state.tokens, state.row_lengths))
                if count == after:
                    if act == "look":
                        found.append(seen(state))
                    elif act == "fork":
                        twin = state.fork()
                        one.step(twin, [3])
                        found.append(seen(twin))
                    elif act == "save":
                        state.save(tmp_path / "a.state")
                        found.append(seen(one.load_state(tmp_path / "a.state")))
                    elif act == "rewind":
                        state.rewind(len(PROMPT) - 1)
                        found.append(seen(state))
                    elif act == "step":
                        one.step(state, [11])
                    elif act == "cancel":
                        break
            found.append(seen(state))
            one.step(state, [7])
            state.rewind(len(PROMPT) - 1)
            found.append(seen(state))
        return found

    assert run(decoder) == on_host(decoder, run)
    assert act == "cancel" or steps_of(decoder)


def test_a_state_that_is_dropped_in_the_middle_leaves_the_next_one_alone(loops):
    decoder = loops.strict()
    expected = tokens_of(decoder)
    for count in range(1, 6):
        events = decoder.generate(PROMPT, 30, policy="stepwise", seed=1, **SAMPLED)
        for _ in range(count):
            next(events)
        del events
        assert tokens_of(decoder) == expected


def test_two_that_are_generated_in_turns_do_not_mix(loops):
    decoder = loops.strict()
    options = [{**SAMPLED, "seed": seed} for seed in range(3)]
    expected = [tokens_of(decoder, **one) for one in options]
    running = [decoder.generate(PROMPT, TOKENS, policy="stepwise", **one) for one in options]
    found = zip(*[(event.token for event in one) for one in running], strict=True)
    assert [list(one) for one in zip(*found, strict=True)] == expected


# Batches


class Driver:
    """Requests on a loop of 8 places: they join when one is free, and the one that was cancelled leaves at once."""

    def __init__(self, decoder, requests):
        self.decoder, self.rows, self.waiting = decoder, LoopRows(decoder._backend, 8), list(enumerate(requests))
        self.found = {number: [] for number, _ in self.waiting}
        self.joined = 0

    def admit(self):
        while self.waiting and None in self.rows.members:
            number, (prompt, count, stop, options) = self.waiting.pop(0)
            vocabulary = (self.decoder.tokenizer, self.decoder.config.vocab_size)
            rules = Generation.of(vocabulary, count, (stop, ()), None, options)
            state = self.decoder.prefill([prompt], policy="stepwise")
            continuation = Continuation(rules, prompt)
            if self.take(number, state, continuation, continuation.choose(state.row_logits(0)), False):
                self.rows.join(state, continuation).number = number
                self.joined += 1

    def take(self, number, state, continuation, token, full):
        """Hand a token out; whether the sequence goes on."""
        event = continuation.take(token, 0.0, (), state.prefill, full)
        if event.finish_reason is None:
            continuation.emit(state, event, full)
        self.found[number].append(token)
        return event.finish_reason is None

    def come_back(self, number, state, continuation):
        """Join again; where the state has run its last token, the host chooses the next one."""
        if state.unfed_token() is None:
            token = continuation.choose(state.row_logits(0))
            if not self.take(number, state, continuation, token, state.row_lengths[0] == state.capacity):
                return
        self.rows.join(state, continuation).number = number

    def run(self, act=lambda driver, number, state: None):
        while self.waiting or any(self.rows.members):
            self.admit()
            for member, chosen in self.rows.step():
                number, state, continuation = member.number, member.state, member.continuation
                if not self.take(number, state, continuation, chosen.token, chosen.full):
                    state.follow((), None)
                    state.ready()
                elif act(self, number, state):
                    state.ready()
                elif state.ahead is None:  # it was used, and comes back
                    self.come_back(number, state, continuation)
        return self.found


def requests_of(golden, count=20):
    dice = np.random.default_rng(1)
    found = []
    for seed in range(count):
        prompt = golden.ids[0, : dice.integers(1, 9)].tolist()
        options = {} if seed % 3 == 0 else {**SAMPLED, **(PENALTIES if seed % 2 else {}), "seed": seed}
        found.append((prompt, int(dice.integers(1, 16)), [int(dice.integers(100))], options))
    return found


@pytest.mark.parametrize("execution", ["strict", "onnx_runtime"])
@pytest.mark.parametrize("name", [GOLDEN, "baseline_ve", "demo"])
def test_rows_that_join_and_leave_get_the_tokens_that_they_get_alone(
    loops_of, export_once, golden_of, decoder_of, execution, name
):
    decoder, requests = getattr(loops_of(export_once(name)), execution)(), requests_of(golden_of(name))
    driver = Driver(decoder, requests)
    found = driver.run()
    assert driver.joined > 8
    reference, differ = decoder_of(name), 0
    for number, (prompt, count, stop, options) in enumerate(requests):
        differ += found[number] != tokens_of(reference, prompt, count, stop_ids=stop, **options)
    assert differ == 0


def test_rows_that_are_used_in_the_middle_are_what_they_are_alone(loops, golden_of, tmp_path):
    """Looked at, forked, saved, and cancelled, while the others go on."""
    decoder, requests, shown = loops.strict(), requests_of(golden_of(GOLDEN)), []

    def act(driver, number, state):
        if len(driver.found[number]) != 2 + number % 3:
            return False
        if number % 4 == 1:
            twin = state.fork()
            decoder.step(twin, [3])
            shown.append(seen(twin))
        elif number % 4 == 2:
            state.save(tmp_path / "a.state")
            shown.append(seen(decoder.load_state(tmp_path / "a.state")))
        elif number % 4 == 3:
            return True
        return False

    found = Driver(decoder, requests).run(act)
    for number, (prompt, count, stop, options) in enumerate(requests):
        alone = on_host(decoder, lambda one: tokens_of(one, prompt, count, stop_ids=stop, **options))  # noqa: B023
        assert found[number] == alone[: len(found[number])]
        assert len(found[number]) == len(alone) or number % 4 == 3
    assert len(shown) > 4
    for tokens, logits, *_ in shown:
        state = decoder.prefill(tokens, policy="stepwise")
        np.testing.assert_allclose(state.logits, np.frombuffer(logits, np.float32).reshape(1, -1), atol=1e-4)


# Faults


def test_logits_that_are_not_finite_end_it_as_on_the_host(loops, monkeypatch):
    decoder = loops.strict()
    calls = [0]
    pool_compute = type(decoder._backend.setup.runner.engine.engine).compute

    def compute(self, shapes, addresses):
        pool_compute(self, shapes, addresses)
        calls[0] += 1
        if calls[0] >= 12:
            self.view("logits", shapes, addresses)[...] = np.nan

    monkeypatch.setattr(type(decoder._backend.setup.runner.engine.engine), "compute", compute)

    def run(one):
        calls[0], found = 0, []
        state = one.prefill([PROMPT], policy="stepwise")
        with pytest.raises(NonFiniteError) as raised:
            for event in one.generate(None, 20, state=state):
                found.append(event.token)  # noqa: PERF401
        return found, state.tokens, str(raised.value)

    found = run(decoder)
    assert found == on_host(decoder, run)
    assert 0 < len(found[0]) < 12


@pytest.mark.parametrize(
    "call", ["cuLaunchKernel", "cuGraphLaunch", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventSynchronize"]
)
def test_after_an_error_the_state_holds_what_was_handed_out(loops, call):
    decoder = loops.strict(cuda_graph=call != "cuLaunchKernel")
    expected = tokens_of(decoder, count=20)
    for after in (0, 1, 3):
        state, found = decoder.prefill([PROMPT], policy="stepwise"), []
        events = decoder.generate(None, 20, state=state)
        found += [next(events).token for _ in range(3)]
        loops.drivers[0].fail(call, CUresult.CUDA_ERROR_INVALID_VALUE, after)
        with pytest.raises(BackendError, match="invalid value"):
            for event in events:
                found.append(event.token)
        assert found == expected[: len(found)]
        assert state.tokens == [PROMPT + found]
        assert tokens_of_state(decoder, state, 20 - len(found)) == expected[len(found) :]


def tokens_of_state(decoder, state, count):
    return [event.token for event in decoder.generate(None, count, state=state)] if count else []
