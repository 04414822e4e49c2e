"""Threads and processes that share a decoder: states of their own give the numbers that they give one after another."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.errors import BackendError

THREADS, STEPS = 4, 40
RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 250, n).tolist() for n in (30, 5, 17, 1)]
TOKENS = RNG.integers(0, 250, (THREADS, STEPS)).tolist()

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


@pytest.fixture(params=["mr_gqa_SSSL", "baseline_ve"])
def decoder(request, decoder_of):
    return decoder_of(request.param)


def story(decoder, index, begun=None):
    """Read, step, fork, rewind, read again, generate: every logit on the way, as bytes."""
    found = []
    state = decoder.prefill([PROMPTS[index]], policy="fixed-point", tolerance=1e-2) if begun is None else begun
    for at, token in enumerate(TOKENS[index]):
        found.append(decoder.step(state, [token]).tobytes())
        if at % 10 == 4:
            twin = state.fork()
            found.append(decoder.step(twin, [at]).tobytes())
            state.rewind(int(state.lengths[0]) - 2)
            found.append(state.logits.tobytes())
    decoder.prefill([PROMPTS[index - 1]], state=state, policy="stepwise")
    found += [event.token for event in decoder.generate(None, 8, state=state, temperature=1.0, seed=index, stop_ids=[])]
    return [*found, state.tokens]


@pytest.mark.parametrize("threads", [1, 2], ids=["one thread a session", "two threads a session"])
def test_four_threads_give_the_numbers_of_one(export_once, threads):
    with lrt_deploy.open_decoder(export_once("mr_gqa_SSSL"), threads=threads) as decoder:
        expected = [story(decoder, index) for index in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in range(3):
                assert list(pool.map(lambda index: story(decoder, index), range(THREADS))) == expected


def test_forks_of_one_state_go_on_in_threads_of_their_own(decoder):
    common = decoder.prefill([PROMPTS[0]], policy="stepwise")
    expected = [story(decoder, index, common.fork()) for index in range(THREADS)]
    forks = [common.fork() for _ in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda index: story(decoder, index, forks[index]), range(THREADS)))
    assert found == expected and len({tuple(map(str, one[-9:])) for one in found}) == THREADS
    assert common.tokens == [PROMPTS[0]]


def test_threads_share_embedding_tables_on_the_host(host_embeddings_once):
    with lrt_deploy.open_decoder(host_embeddings_once("mr_gqa_SSSL")) as decoder:
        expected = [story(decoder, index) for index in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            assert list(pool.map(lambda index: story(decoder, index), range(THREADS))) == expected


def in_a_forked_process(work):
    """What `work` returns or raises in a child that shares this process's memory."""

    def run(sender):
        try:
            sender.send(work())
        except BackendError as error:
            sender.send(error)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(sender,))
    child.start()
    assert receiver.poll(60), "the forked process hangs"
    found = receiver.recv()
    child.join(60)
    assert child.exitcode == 0
    return found


@needs_fork
def test_a_forked_process_goes_on_with_the_same_numbers(export_once):
    with lrt_deploy.open_decoder(export_once("mr_gqa_SSSL"), threads=1) as decoder:
        state = decoder.prefill([PROMPTS[0]], policy="stepwise")
        expected = story(decoder, 1, state.fork())
        assert in_a_forked_process(lambda: story(decoder, 1, state)) == expected
        assert story(decoder, 1, state) == expected  # the child's steps were its own


@needs_fork
def test_a_forked_process_without_the_threads_is_told_to_open_the_bundle(export_once):
    with lrt_deploy.open_decoder(export_once("mr_gqa_SSSL"), threads=2) as decoder:
        state = decoder.prefill([PROMPTS[0]], policy="stepwise")
        found = in_a_forked_process(lambda: decoder.step(state, [1]))
        assert isinstance(found, BackendError) and "open the bundle in each process" in str(found)
        decoder.step(state, [1])
