"""What goes wrong on a GPU and shows nowhere: threads, captures, interrupts, forks, finalizers and errors.

On `fake_cuda` and `fake_tensorrt`, which are stricter than a GPU. LRT_GPU_INTERLEAVINGS says how many random
interleavings are run, 100 by default.
"""

from __future__ import annotations

import gc
import linecache
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import CUresult, FakeDriver
from fake_tensorrt import GPU, FakeRuntimeCache, FakeRuntimeConfig, fake_library, put_engine

from lrt_deploy.bundle.engine_sidecar import RUNTIME_CACHE, engine_folder
from lrt_deploy.bundle.manifest import read_manifest
from lrt_deploy.errors import BackendError, StateError
from lrt_deploy.runtime.backends import cuda as cuda_module
from lrt_deploy.runtime.backends import device as device_module
from lrt_deploy.runtime.backends.cuda import Arena, CudaDevice
from lrt_deploy.runtime.backends.device import DeviceBuffers
from lrt_deploy.runtime.backends.tensorrt import TensorRTBackend, open_engine
from lrt_deploy.runtime.decoder import Decoder

PROMPT = [5, 9, 2, 77, 31, 200, 4, 18, 6, 42, 42, 7]
FINALIZERS = ("give_back", "_return", "_free_returned", "keep")  # an exception in one is lost
INTERLEAVINGS = int(os.environ.get("LRT_GPU_INTERLEAVINGS", "100"))

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@pytest.fixture(scope="module")
def bundle(export_once, tmp_path_factory):
    import shutil

    folder = shutil.copytree(export_once("mr_gqa_SSSL"), tmp_path_factory.mktemp("hazards") / "bundle")
    put_engine(folder)
    return folder


@pytest.fixture
def open_on(bundle):
    """(driver) -> decoder on it, and the fake engine."""

    def open_(driver, cuda_graph=True, cache=None):
        with pytest.MonkeyPatch.context() as patch:  # needed for opening only
            patch.setitem(sys.modules, "cuda.bindings.driver", driver)
            device = CudaDevice()
            patch.setitem(sys.modules, "tensorrt_rtx", fake_library(bundle, driver))
            manifest = read_manifest(bundle)
            engine = open_engine(bundle, manifest, "tensorrt-rtx", "fp32", GPU)
        return Decoder(
            manifest, TensorRTBackend(engine, device, manifest, cuda_graph, None, cache), None
        ), engine.engine

    return open_


@pytest.fixture
def driver():
    driver = FakeDriver(seed=1)
    yield driver
    assert driver.violations == []


def in_thread(act):
    """What `act` returns in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def story(decoder, prompt, policy):
    state = decoder.prefill([prompt], policy=policy, tolerance=1e-2)
    return [state.logits.tobytes(), *(decoder.step(state, [token]).tobytes() for token in range(6))]


# Threads


@pytest.mark.parametrize("policy", ["stepwise", "fixed-point"])
def test_threads_with_states_of_their_own_get_the_numbers_that_they_get_alone(open_on, driver, policy):
    decoder, _ = open_on(driver)
    prompts = [PROMPT[i:] + PROMPT[:i] for i in range(6)]
    expected = [story(decoder, prompt, policy) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda prompt: story(decoder, prompt, policy), prompts * 3))
    assert found == expected * 3


def test_every_thread_binds_the_device_before_it_calls(open_on, driver):
    decoder, _ = open_on(driver)
    state = decoder.prefill([PROMPT], policy="stepwise")
    expected = state.fork()
    assert np.array_equal(in_thread(lambda: decoder.step(state, [3])), decoder.step(expected, [3]))
    found = in_thread(lambda: driver.cuStreamSynchronize(7))  # the twin
    assert found[0] == CUresult.CUDA_ERROR_INVALID_CONTEXT


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_and_does_not_wait_for_a_lock_that_nobody_releases(open_on, driver):
    decoder, _ = open_on(driver)
    state = decoder.prefill([PROMPT], policy="stepwise")
    before = state.logits
    with decoder._backend.device.lock:
        assert in_child(decoder, state)
    assert np.array_equal(state.logits, before) and decoder.step(state, [1]).shape == (1, 320)


def in_child(decoder, state):
    """Whether a forked child is refused, and can drop what it holds."""
    child = os.fork()
    if child == 0:
        try:
            decoder.step(state, [1])
        except BackendError as error:
            del state
            gc.collect()
            os._exit(7 if "forked" in str(error) else 1)
        except BaseException:
            os._exit(2)
        os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# Captures


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "call", ["cuStreamBeginCapture", "cuMemcpyHtoDAsync", "cuStreamEndCapture", "cuGraphInstantiate"]
)
def test_an_interrupt_while_capturing_leaves_neither_a_capture_nor_a_wrong_number(open_on, driver, call, when):
    decoder, _ = open_on(driver)
    state = decoder.prefill([PROMPT[:1]], policy="stepwise")
    expected = decoder.prefill([PROMPT[:1]], policy="stepwise")
    expected = [decoder.step(expected, [token]).tobytes() for token in (4, 5, 6)]
    fresh, _ = open_on(driver)
    state = fresh.prefill([PROMPT[:1]], policy="stepwise")  # the next step captures
    armed = [True]

    def interrupt(name):
        if name == call and armed and (name != "cuMemcpyHtoDAsync" or driver.capture is not None):
            armed.clear()
            raise KeyboardInterrupt

    setattr(driver, when, interrupt)
    enabled = gc.isenabled()
    with pytest.raises(KeyboardInterrupt):
        fresh.step(state, [4])
    assert gc.isenabled() == enabled
    assert [fresh.step(state, [token]).tobytes() for token in (4, 5, 6)] == expected
    assert driver.capture is None and len(driver.templates) <= 1


def test_memory_freed_while_a_graph_is_captured_waits_until_it_is_done(open_on, driver):
    decoder, engine = open_on(driver)
    state, dropped = (decoder.prefill([PROMPT[:1]], policy="stepwise") for _ in range(2))
    decoder._backend.steps.keep(None)
    arena = Arena(decoder._backend.device)
    arena.allocate(64)
    held = [dropped, arena]
    plain = engine.contexts[0].execute_async_v3

    def execute(stream):
        held.clear()
        gc.collect()
        return plain(stream)

    del dropped, arena
    engine.contexts[0].execute_async_v3 = execute
    count, launches = len(driver.memory), driver.launches
    decoder.step(state, [1])
    assert driver.launches == launches + 1 and len(driver.memory) == count
    decoder.step(state, [1])
    assert len(driver.memory) < count


def test_an_arena_gives_back_what_it_can(driver, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    arena = Arena(CudaDevice())
    for _ in range(3):
        arena.allocate(64)
    arena.device.synchronize()
    driver.fail("cuMemFree", CUresult.CUDA_ERROR_INVALID_VALUE, after=1)
    arena.release()
    assert len(driver.memory) == 1


def test_a_stream_that_cannot_be_captured_decodes_without_a_graph(open_on, driver):
    """As of an engine that was built without REQUIRE_USER_ALLOCATION."""
    decoder, engine = open_on(driver)
    expected = story(decoder, PROMPT, "stepwise")
    for context in engine.contexts:
        context.is_stream_capturable = lambda stream: False
    decoder._backend.steps.keep(None)
    launches = driver.launches
    assert story(decoder, PROMPT, "stepwise") == expected and driver.launches == launches > 0


# What states share


def test_states_share_contexts_working_memory_and_graphs(open_on, driver):
    decoder, engine = open_on(driver)
    states = [decoder.prefill([PROMPT], policy="stepwise") for _ in range(3)]
    decoder.prefill([PROMPT], policy="zero", state=decoder.prefill([PROMPT], policy="stepwise"))
    assert len(engine.contexts) == 2 and len({context.workspace for context in engine.contexts}) == 1
    states.clear()
    captured = len(driver.graphs)
    for _ in range(4):  # one after another, as a server makes them
        story(decoder, PROMPT, "stepwise")
    assert len(driver.graphs) == captured and engine.compiled == ["(1, 1)"]


def test_a_state_on_used_memory_starts_empty(open_on, driver):
    decoder, _ = open_on(driver)
    first = decoder.prefill([PROMPT], policy="stepwise")
    assert first.cache(0)[0].any()
    del first
    found = decoder._backend.allocate(1)
    assert not any(array.any() for array in found.read_slots(0, 0, 128).values()) and not found.latent.any()


def test_the_same_prompt_gives_the_same_bits_also_the_first_time(open_on, driver, monkeypatch):
    decoder, _ = open_on(driver)
    first, second = (story(decoder, PROMPT, "zero") for _ in range(2))
    assert first == second
    monkeypatch.setattr(
        FakeRuntimeConfig,
        "dynamic_shapes_kernel_specialization_strategy",
        property(lambda self: "lazy", lambda self, value: None),
        raising=False,
    )
    decoder, _ = open_on(driver)  # the twin: what stands in rounds differently
    assert story(decoder, PROMPT, "zero") != first


def test_compiled_kernels_are_kept_beside_the_plan_and_found_again(bundle, open_on, driver):
    cache = engine_folder(bundle, "tensorrt-rtx", "fp32") / RUNTIME_CACHE
    decoder, engine = open_on(driver, cache=cache)
    expected = story(decoder, PROMPT, "stepwise")
    assert engine.compiled == ["(1, 1)"] and cache.read_bytes() == b"kernels:(1, 1)"
    decoder, engine = open_on(driver, cache=cache)
    assert story(decoder, PROMPT, "stepwise") == expected and engine.compiled == []
    cache.write_bytes(b"of another version")
    decoder, engine = open_on(driver, cache=cache)
    assert story(decoder, PROMPT, "stepwise") == expected and engine.compiled == ["(1, 1)"]
    assert cache.read_bytes() == b"kernels:(1, 1)" and FakeRuntimeCache().deserialize(cache.read_bytes())
    cache.unlink()


# Rows that move


def added(decoder, state):
    found = decoder.new_state(3)
    for row in (2, 0):
        found.add(state, row)
    return found


def dropped(decoder, state):
    state.drop(0)
    return state


MOVES = {
    "drop": (dropped, [2, 1]),
    "add": (added, [2, 0]),
    "fork": (lambda decoder, state: state.fork(), [0, 1, 2]),
    "rows": (lambda decoder, state: state.rows([1, 1, 0]), [1, 1, 0]),
}
PROMPTS = [PROMPT, PROMPT[3:], PROMPT[:7]]


@pytest.mark.parametrize("name", MOVES)
def test_rows_move_on_the_device(open_on, driver, name):
    """Latents, which the host knows, go to the device; no cache entry goes to the host or comes from it."""
    decoder, _ = open_on(driver)
    move, order = MOVES[name]
    state = decoder.prefill(PROMPTS, policy="stepwise")
    driver.copies.clear()
    moved = move(decoder, state)
    moved.ready()
    copies, config = list(driver.copies), decoder.config
    assert {size for size, way in copies if way != "within"} == {4 * config.n_embd}
    heads = sum(way == "within" for _, way in copies)
    rows = 1 if name == "drop" else len(order)
    assert heads == rows * 2 * config.n_layer * config.n_kv_head
    assert moved.tokens == [PROMPTS[i] for i in order]
    expected = decoder.prefill([PROMPTS[i] for i in order], policy="stepwise")
    for token in (4, 9):
        assert np.array_equal(decoder.step(moved, [token] * len(order)), decoder.step(expected, [token] * len(order)))
    driver.copies.clear()
    super(DeviceBuffers, moved.buffers).copy_row(0, expected.buffers, 0, 5)  # the twin: over the host
    assert {way for _, way in driver.copies} == {"in", "out"}


def test_rows_of_another_device_move_over_the_host(open_on, driver):
    one, other = open_on(driver)[0], open_on(FakeDriver(seed=2))[0]
    state = one.prefill([PROMPT], policy="stepwise")
    moved = other.new_state(1)
    moved.add(state)
    assert np.array_equal(other.step(moved, [4]), one.step(state, [4]))


@pytest.mark.parametrize("name", ["drop", "add"])
@pytest.mark.parametrize("way", ["interrupt", "error"])
def test_a_move_that_is_interrupted_at_any_copy_leaves_no_wrong_number(open_on, driver, name, way):
    decoder, _ = open_on(driver)
    expected = decoder.prefill(PROMPTS, policy="stepwise").logits
    for at in range(0, 60, 7):
        state = decoder.prefill(PROMPTS, policy="stepwise")
        target = decoder.new_state(3) if name == "add" else state
        count = iter(range(10**6))

        def fail(called, at=at, count=count):
            if called == "cuMemcpy2DAsync" and next(count) == at:
                raise KeyboardInterrupt

        if way == "interrupt":
            driver.before = fail
        else:
            driver.fail("cuMemcpy2DAsync", CUresult.CUDA_ERROR_INVALID_VALUE, after=at)
        with suppress(KeyboardInterrupt, BackendError):
            if name == "add":
                target.add(state, 2)
                target.add(state, 1)
            else:
                target.drop(0)
                target.ready()
        driver.before = lambda called: None
        driver.failures.clear()
        held = target.tokens
        order = [PROMPTS.index(tokens) for tokens in held]
        assert order in ([[], [2], [2, 1]] if name == "add" else [[0, 1, 2], [2, 1]])
        if order:
            assert np.array_equal(target.logits, expected[order])
            reference = decoder.prefill(held, policy="stepwise")
            tokens = [5] * len(order)
            assert np.array_equal(decoder.step(target, tokens), decoder.step(reference, tokens))


# Errors


def test_after_a_sticky_error_the_first_one_is_reported_and_nothing_is_called(open_on, driver):
    decoder, _ = open_on(driver)
    state = decoder.prefill([PROMPT], policy="stepwise")
    driver.fail("cuGraphLaunch", CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
    with pytest.raises(BackendError, match="launching a CUDA graph: illegal address"):
        decoder.step(state, [1])
    called = []
    driver.before = called.append
    for _ in range(2):
        with pytest.raises(
            BackendError, match=r"cannot be used any more.*launching a CUDA graph: illegal address.*again"
        ):
            decoder.step(state, [1])
    with pytest.raises(BackendError, match="cannot be used any more"):
        decoder.prefill([PROMPT])
    assert called == []


def test_an_error_that_is_not_sticky_leaves_the_backend_alive(open_on, driver):
    decoder, _ = open_on(driver)
    state, healthy = (decoder.prefill([PROMPT], policy="stepwise") for _ in range(2))
    driver.fail("cuGraphLaunch", CUresult.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(BackendError, match="invalid value"):
        decoder.step(state, [1])
    assert np.array_equal(decoder.step(state, [1]), decoder.step(healthy, [1]))


def test_a_state_that_does_not_fit_leaves_no_memory(open_on, driver):
    decoder, _ = open_on(driver)
    story(decoder, PROMPT, "stepwise")
    decoder._backend.steps.keep(None)
    decoder.prefill([PROMPT], policy="stepwise")
    count, used = len(driver.memory), sum(block.size for block in driver.memory.values())
    driver.memory_bytes = used + 3 * decoder._backend.setup.cache_row_bytes
    for _ in range(3):
        with pytest.raises(BackendError, match=r"allocating .* bytes: out of memory"):
            decoder.prefill([PROMPT] * 4, policy="stepwise")
    with decoder._backend.device.lock:
        decoder._backend.device.begin()
    assert len(driver.memory) <= count


# All of it at once


class Interleaving:
    """Two threads with states of their own, interrupted between any two lines, and what they must find."""

    def __init__(self, seed, decoder, driver, expected):
        self.random, self.decoder, self.driver, self.expected = random.Random(seed), decoder, driver, expected  # noqa: S311
        self.faults, self.counts = [], dict.fromkeys(("operations", "interrupts", "errors", "forks", "dead"), 0)
        self.watched = {cuda_module.__file__, device_module.__file__}
        self.ways = [self.random.getrandbits(32) for _ in range(2)]

    def run(self):
        threads = [threading.Thread(target=self.work, args=(way,), daemon=True) for way in self.ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()  # without a limit, which a busy or a paused machine would reach; pytest has one
        return self.faults + self.driver.violations

    def work(self, way):
        try:
            self.play(random.Random(way))  # noqa: S311
        except BaseException as error:
            self.faults.append(repr(error))

    def play(self, dice):
        states = []
        for _ in range(8):
            self.counts["operations"] += 1
            act = dice.choice(("read", "step", "step", "step", "fork", "drop", "collect", "fail", "child"))
            if act == "drop" and states:
                dropped = states.pop(dice.randrange(len(states)))
                dropped.extra["itself"] = dropped  # a cycle, for the collector
            elif act == "collect":
                gc.collect()
            elif act == "fail":
                self.fail(dice)
            elif act == "child" and states and hasattr(os, "fork") and dice.random() < 0.3:
                self.counts["forks"] += 1
                if not in_child(self.decoder, states[-1]):
                    self.faults.append("a child was not refused")
            elif act in ("read", "step", "fork"):
                self.attempt(dice, lambda act=act: self.advance(dice, act, states))
            for state in states:
                self.check(dice, state)

    def fail(self, dice):
        name = dice.choice(
            ("cuMemcpyHtoDAsync", "cuGraphLaunch", "cuStreamEndCapture", "cuGraphInstantiate", "cuMemAlloc")
        )
        sticky = dice.random() < 0.05
        self.driver.fail(name, CUresult.CUDA_ERROR_LAUNCH_FAILED if sticky else CUresult.CUDA_ERROR_INVALID_VALUE)

    def advance(self, dice, act, states):
        if act == "read" or not states:
            states.append(self.decoder.prefill([PROMPT[: dice.randint(1, 4)]], policy="stepwise"))
        elif act == "fork":
            states.append(dice.choice(states).fork())
        else:
            self.decoder.step(dice.choice(states), [dice.randrange(4)])

    def attempt(self, dice, act):
        """Run an operation; perhaps interrupt it between two lines of the device's code."""
        left = [dice.choice((-1, -1, dice.randint(1, 150)))]

        def trace(frame, event, argument):
            if frame.f_code.co_filename not in self.watched or frame.f_code.co_name in FINALIZERS:
                return None
            if frame.f_back.f_code.co_name in FINALIZERS or "with" in linecache.getline(
                frame.f_code.co_filename, frame.f_lineno
            ):  # Python runs no signal handler between the end of a with block and its exit
                return trace
            left[0] -= event == "line"
            if left[0] == 0:
                left[0] = -1
                raise KeyboardInterrupt
            return trace

        if left[0] > 0:
            sys.settrace(trace)
        try:
            act()
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1
        except BackendError as error:
            self.counts["errors"] += 1
            self.counts["dead"] += "any more" in str(error)
        finally:
            sys.settrace(None)

    def check(self, dice, state):
        """Compare what a state says follows its tokens with what follows them."""
        for _ in range(4):
            try:
                tokens, found = tuple(state.tokens[0]), state.logits
            except (BackendError, StateError) as error:
                if "any more" in str(error):
                    return
                continue
            if tokens and not np.array_equal(found[0], self.expected(tokens)):
                self.faults.append(f"wrong numbers after {tokens}")
            return


@pytest.fixture
def expected_of(open_on):
    """tokens -> the logits after them, on a driver that does everything at once and in one thread."""
    calm, _ = open_on(FakeDriver(eager=True), cuda_graph=False)
    known, lock = {}, threading.Lock()

    def expected(tokens):
        with lock:
            if tokens not in known:
                known[tokens] = calm.prefill([tokens], policy="stepwise").logits[0]
            return known[tokens]

    return expected


@pytest.fixture
def few_objects():
    """A collection looks at what the test has made only, and is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_no_interleaving_gives_a_wrong_number(open_on, expected_of, few_objects):
    total = {}
    for seed in range(INTERLEAVINGS):
        driver = FakeDriver(seed)
        decoder, _ = open_on(driver)
        one = Interleaving(seed, decoder, driver, expected_of)
        assert one.run() == [], f"seed {seed}"
        assert gc.isenabled()
        total = {name: total.get(name, 0) + count for name, count in one.counts.items()}
    print(f"{INTERLEAVINGS} interleavings: {total}")  # noqa: T201
    assert INTERLEAVINGS < 50 or min(total.values()) > 0
