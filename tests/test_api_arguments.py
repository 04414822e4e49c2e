"""Every argument of the public functions, given values of every kind: a documented meaning or an error of ours.

Never a raw Python error (a TypeError for a name that a function does not have apart), and never a changed state.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lrt_deploy
from lrt_deploy.errors import InputError, LRTDeployError, StateError
from lrt_deploy.runtime.batch import BatchDecoder
from lrt_deploy.runtime.fixed_point import SweepOptions
from lrt_deploy.runtime.prefill import PrefillOptions
from lrt_deploy.runtime.prompt_cache import PromptCache
from lrt_deploy.runtime.sampling import SamplingOptions

NAME = "gate32"


class Odd:
    """An object with a broken repr."""

    def __repr__(self):
        raise RuntimeError


VALUES = {
    "None": None,
    "True": True,
    "False": False,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "0": 0,
    "1": 1,
    "2": 2,
    "2**70": 2**70,
    "-2**70": -(2**70),
    "10**5000": 10**5000,
    "1.0": 1.0,
    "0.5": 0.5,
    "1e308": 1e308,
    "1j": 1j,
    "''": "",
    "'a'": "a",
    "'1'": "1",
    "NUL": "\0",
    "surrogate": "\ud800",
    "b''": b"",
    "b'a'": b"a",
    "[]": [],
    "[[]]": [[]],
    "[1]": [1],
    "[1, 2]": [1, 2],
    "[1.5]": [1.5],
    "['a']": ["a"],
    "['']": [""],
    "[None]": [None],
    "[True]": [True],
    "[1, True]": [1, True],
    "[[True]]": [[True]],
    "[10**5000]": [10**5000],
    "[[1], [2]]": [[1], [2]],
    "[[1], 2]": [[1], 2],
    "[[[1]]]": [[[1]]],
    "()": (),
    "{}": {},
    "{'a': 1}": {"a": 1},
    "set": {1},
    "object": object(),
    "broken repr": Odd(),
    "function": lambda *arguments: None,
    "np.int64(1)": np.int64(1),
    "np.uint8(1)": np.uint8(1),
    "np.float32(0.5)": np.float32(0.5),
    "np.bool": np.bool_(True),
    "array 0-d": np.array(1),
    "array ints": np.array([1, 2]),
    "array floats": np.array([1.5, 2.5]),
    "array bools": np.array([True]),
    "array 2-d": np.array([[1, 2]]),
    "array objects": np.array([object()], object),
    "array texts": np.array(["a"]),
    "array empty": np.zeros((0, 3)),
    "uint64": np.array([2**64 - 1], np.uint64),
    "range": range(1, 3),
    "generator": (i for i in (1,)),
    "long list": [1] * 5000,
    "path": Path("/dev/null/none"),
}
UNSETTLED = {"surrogate"}  # as text to tokenize: the tokenizer decides
WHOLE = {"0", "1", "2", "np.int64(1)", "np.uint8(1)"}
COUNT = WHOLE - {"0"}
NUMBER = {*WHOLE, "1.0", "0.5", "np.float32(0.5)"}
PATHS = {"'a'", "'1'", "path"}
FLAGS = {"True", "False"}
# A list of token ids of a vocabulary that has 1 and 2, in any sequence.
IDS = {"[1]", "[1, 2]", "array ints", "range"}
ROWS = {"[[1], [2]]", "array 2-d"}
TEXT_LIST = {"['a']", "[]", "()", "array texts"}


@pytest.fixture(scope="module")
def decoder(export_once):
    with lrt_deploy.open_decoder(export_once(NAME), max_seq_len=64) as opened:
        yield opened


@pytest.fixture(scope="module")
def env(decoder, export_once, tmp_path_factory):
    """What calls need; `state()` is a new state of one sequence, `pair()` of two."""
    folder = tmp_path_factory.mktemp("arguments")
    saved = folder / "saved.state"
    decoder.prefill([[3, 1, 4]]).save(saved)
    return SimpleNamespace(
        decoder=decoder,
        bundle=export_once(NAME),
        folder=folder,
        saved=saved,
        state=lambda: decoder.prefill([[3, 1, 4]]),
        pair=lambda: decoder.prefill([[3, 1, 4], [1, 5]]),
        cache=PromptCache(folder / "cache"),
    )


def events(iterator):
    return list(islice(iterator, 2))


def in_folder(env, value, name="made"):
    """A path below the test's folder, where the value is one; the value itself otherwise."""
    return env.folder / name / value if isinstance(value, str) and value in ("a", "1") else value


def generating(**fixed):
    """Calls `generate` with one odd option."""
    return {
        f"generate {name}": (lambda env, v, name=name: events(env.decoder.generate([1], **{name: v})), accepted)
        for name, accepted in fixed.items()
    }


def submitting(**fixed):
    def call(env, value, name):
        batch = BatchDecoder(env.decoder)
        batch.submit([1], **{"max_new_tokens": 2, name: value})
        return events(batch.run())

    return {
        f"submit {name}": (lambda env, v, name=name: call(env, v, name), accepted) for name, accepted in fixed.items()
    }


def fields(kind, **accepted):
    return {f"{kind.__name__} {name}": (lambda env, v, name=name: kind(**{name: v}), a) for name, a in accepted.items()}


OPTIONS = {
    "max_new_tokens": COUNT,
    "stop_ids": {"None", *IDS, "[]", "()", "set", "long list"},
    "stop_strings": TEXT_LIST,
    "policy": set(),
    "tolerance": {"None", "1e308", "2**70", *NUMBER},
    "temperature": NUMBER,
    "top_k": WHOLE | {"2**70", "10**5000"},
    "top_p": {"1", "1.0", "0.5", "np.int64(1)", "np.uint8(1)", "np.float32(0.5)"},
    "min_p": {"0", "1", "1.0", "0.5", "np.int64(1)", "np.uint8(1)", "np.float32(0.5)"},
    "repetition_penalty": NUMBER - {"0"},
    "seed": {"None", *WHOLE, "2**70", "10**5000"},
    "frequency_penalty": NUMBER | {"-1"},
    "presence_penalty": NUMBER | {"-1"},
    "logit_bias": {"{}"},
    "logprobs": {"None", *WHOLE},
}
REQUEST = {
    "max_new_tokens": WHOLE,
    "n": COUNT,
    "prompt_logprobs": {"None", *WHOLE},
    "keep_state": FLAGS,
    "latent_cosine": FLAGS,
    "priority": WHOLE | {"-1"},
    "deadline_s": {"None", "1e308", "2**70", *NUMBER},
}
STATE = {"state": {"None"}}
SAMPLING = {name: OPTIONS[name] for name in SamplingOptions.__dataclass_fields__}

# name of the call -> (call, names of the values that it accepts)
CALLS = {
    "open_decoder bundle": (lambda env, v: lrt_deploy.open_decoder(v), set()),
    "open_decoder backend": (lambda env, v: lrt_deploy.open_decoder(env.bundle, v), set()),
    "open_decoder precision": (lambda env, v: lrt_deploy.open_decoder(env.bundle, precision=v), {"None"}),
    "open_decoder threads": (
        lambda env, v: lrt_deploy.open_decoder(env.bundle, threads=v),
        {"None", *COUNT},
    ),
    "open_decoder max_seq_len": (
        lambda env, v: lrt_deploy.open_decoder(env.bundle, max_seq_len=v),
        {"None", *COUNT},
    ),
    "open_decoder verify": (lambda env, v: lrt_deploy.open_decoder(env.bundle, verify=v), FLAGS),
    "open_decoder prefill_options": (lambda env, v: lrt_deploy.open_decoder(env.bundle, prefill_options=v), {"None"}),
    "open_decoder cuda_graph": (lambda env, v: lrt_deploy.open_decoder(env.bundle, cuda_graph=v), FLAGS),
    "open_decoder device_loop": (lambda env, v: lrt_deploy.open_decoder(env.bundle, device_loop=v), FLAGS),
    "prefill prompts": (lambda env, v: env.decoder.prefill(v), ROWS),
    "prefill prompt": (lambda env, v: env.decoder.prefill([v]), IDS),
    "prefill state": (lambda env, v: env.decoder.prefill([[1]], state=v), {"None"}),
    "prefill policy": (lambda env, v: env.decoder.prefill([[1]], policy=v), set()),
    "prefill tolerance": (lambda env, v: env.decoder.prefill([[1]], tolerance=v), {"None", "1e308", "2**70", *NUMBER}),
    "prefill reuse": (lambda env, v: env.decoder.prefill([[3, 1, 4, 1]], state=env.state(), reuse=v), FLAGS),
    "step state": (lambda env, v: env.decoder.step(v, [1]), set()),
    "step tokens": (lambda env, v: env.decoder.step(env.pair(), v), {"[1, 2]", "array ints", "range"}),
    "load_state": (lambda env, v: env.decoder.load_state(v), set()),
    "adopt": (lambda env, v: env.decoder.adopt(v), set()),
    "new_state": (lambda env, v: env.decoder.new_state(v), COUNT),
    "generate prompt": (lambda env, v: events(env.decoder.generate(v)), {*IDS, "'a'", "'1'", "''", "NUL"}),
    "rewind": (lambda env, v: env.state().rewind(v), {*WHOLE, "[1]"}),
    "rows": (lambda env, v: env.pair().rows(v), {"[1]"}),
    "add source": (lambda env, v: env.decoder.new_state(2).add(v), {"None"}),
    "add index": (lambda env, v: env.decoder.new_state(2).add(env.pair(), v), {"0", "1", "np.int64(1)", "np.uint8(1)"}),
    "drop": (lambda env, v: env.pair().drop(v), {"0", "1", "np.int64(1)", "np.uint8(1)"}),
    "save": (lambda env, v: env.state().save(in_folder(env, v)), {"'a'", "'1'"}),
    "BatchDecoder decoder": (lambda env, v: BatchDecoder(v), set()),
    "BatchDecoder slots": (lambda env, v: BatchDecoder(env.decoder, v), {"None", *COUNT}),
    "BatchDecoder lanes": (lambda env, v: BatchDecoder(env.decoder, 2, v).close(), COUNT),
    "submit prompt": (lambda env, v: BatchDecoder(env.decoder).submit(v), {*IDS, "'a'", "'1'", "''", "NUL"}),
    "cancel": (lambda env, v: BatchDecoder(env.decoder).cancel(v), WHOLE),
    "suspend": (lambda env, v: BatchDecoder(env.decoder).suspend(v), WHOLE),
    "resume": (lambda env, v: BatchDecoder(env.decoder).resume(v), WHOLE),
    "max_waiting": (lambda env, v: BatchDecoder(env.decoder, max_waiting=v), {"None", *WHOLE}),
    "max_waiting_tokens": (lambda env, v: BatchDecoder(env.decoder, max_waiting_tokens=v), {"None", *WHOLE}),
    "blocks_per_step": (lambda env, v: BatchDecoder(env.decoder, blocks_per_step=v), COUNT),
    "PromptCache folder": (lambda env, v: PromptCache(in_folder(env, v, "caches")), {"'a'", "'1'"}),
    "PromptCache max_bytes": (lambda env, v: PromptCache(env.folder / "c", v), WHOLE),
    "PromptCache.prefill decoder": (lambda env, v: env.cache.prefill(v, [1]), set()),
    "PromptCache.prefill tokens": (lambda env, v: env.cache.prefill(env.decoder, v), IDS),
    "PromptCache.prefill policy": (lambda env, v: env.cache.prefill(env.decoder, [1], v), set()),
    **generating(**OPTIONS, **STATE, reuse=FLAGS),
    **submitting(**OPTIONS | STATE | REQUEST),
    **fields(SamplingOptions, **SAMPLING),
    **fields(PrefillOptions, stepwise_below={"None", *WHOLE}, sweeps=set()),
    **fields(
        SweepOptions,
        stride=COUNT,
        chunk_tokens=COUNT,
        largest_chunk_tokens=COUNT,
        max_sweeps=COUNT,
        min_block_tokens=COUNT,
        noise=NUMBER | {"1e308", "2**70"},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_value_is_taken_as_documented_or_refused_by_an_error_of_ours(env, name):
    call, accepted = CALLS[name]
    (env.folder / "made").mkdir(exist_ok=True)
    taken, raw = set(), []
    for label, value in VALUES.items():
        try:
            call(env, value)
        except LRTDeployError as error:
            assert str(error) and len(str(error)) < 1000, label
        except Exception as error:
            raw.append(f"{label}: {type(error).__name__}: {str(error)[:100]}")
        else:
            taken.add(label)
    assert raw == []
    assert taken - (UNSETTLED if "prompt" in name else set()) == accepted


EXPORT = {
    "checkpoint": PATHS,
    "bundle": PATHS,
    "precision": set(),
    "max_seq_len": {"None", *COUNT},
    "max_batch_size": {"None", *COUNT},
    "tokenizer": {"None", *PATHS},
    "step": {"None", *WHOLE},
    "force": FLAGS,
    "add": FLAGS,
    "calibration": {"None", *PATHS},
    "keep_high": {"None", *TEXT_LIST, "['']"},
    "compensate": {"None", *FLAGS},
    "int4_block": {"None"},
    "host_embeddings": FLAGS,
    "progress": {"function"},
}
BUILD = {
    "bundle": PATHS,
    "backend": set(),
    "precision": {"None", "'a'", "'1'", "''", "NUL", "surrogate"},
    "chunk_tokens": {"None", *COUNT},
    "force": FLAGS,
    "progress": {"function"},
}


@pytest.mark.parametrize("name", EXPORT)
def test_export_refuses_odd_values_before_it_looks_for_the_checkpoint(tmp_path, name):
    taken = set()
    for label, value in VALUES.items():
        options = {"checkpoint": "/nowhere", "bundle": tmp_path / "bundle", name: value}
        with pytest.raises(LRTDeployError) as caught:
            lrt_deploy.export_bundle(options.pop("checkpoint"), options.pop("bundle"), **options)
        if not (isinstance(caught.value, InputError) and str(caught.value).startswith(name)):
            taken.add(label)
    assert taken - EXPORT[name] <= taken_by_its_own_check(name)
    assert EXPORT[name] <= taken
    assert list(tmp_path.iterdir()) == []


def taken_by_its_own_check(name):
    """Values of the right type that are refused for what they say, by ExportError or CheckpointError."""
    texts = {"''", "'a'", "'1'", "NUL", "surrogate"}
    return {
        "precision": texts | TEXT_LIST | {"['']"},
        "int4_block": WHOLE,
        "max_seq_len": {"0"},
        "max_batch_size": {"0"},
    }.get(name, set())


@pytest.mark.parametrize("name", BUILD)
def test_build_refuses_odd_values_before_it_looks_for_the_bundle(tmp_path, name):
    taken = set()
    for label, value in VALUES.items():
        options = {"bundle": tmp_path / "none", name: value}
        with pytest.raises(LRTDeployError) as caught:
            lrt_deploy.build_engine(options.pop("bundle"), **options)
        if not (isinstance(caught.value, InputError) and str(caught.value).startswith(name)):
            taken.add(label)
    assert BUILD[name] <= taken <= BUILD[name] | {"''", "'a'", "'1'", "NUL", "surrogate"}
    assert list(tmp_path.iterdir()) == []


def test_a_refused_call_leaves_the_state_as_it_was(env):
    """The argument is checked before anything is computed or written."""
    for name in ("prefill", "step", "rewind", "drop"):
        state = env.pair()
        before = (state.tokens, state.logits.tolist(), state.latent.tolist())
        for value in VALUES.values():
            calls = {
                "prefill": lambda state=state, value=value: env.decoder.prefill(value, state=state),
                "step": lambda state=state, value=value: env.decoder.step(state, value),
                "rewind": lambda state=state, value=value: state.rewind(value),
                "drop": lambda state=state, value=value: state.drop(value),
            }
            try:
                calls[name]()
                state = env.pair()
            except (InputError, StateError):
                assert (state.tokens, state.logits.tolist(), state.latent.tolist()) == before


def test_names_that_no_function_has_are_type_errors_and_unknown_sampling_options_are_ours(env):
    for call in (env.decoder.prefill, env.decoder.step, lrt_deploy.open_decoder, lrt_deploy.export_bundle):
        with pytest.raises(TypeError):
            call(colour=1)
    with pytest.raises(InputError, match="there is no sampling option 'colour'"):
        env.decoder.generate([1], colour=1)


@pytest.mark.parametrize("value", [["a"], [-1], [10**9], [1.0], [True], 7, "1", b"1", [None]])
def test_stop_ids_are_ids_of_the_vocabulary(env, value):
    with pytest.raises(InputError, match="stop_ids"):
        env.decoder.generate([1], stop_ids=value)


@pytest.mark.parametrize("value", [math.nan, True, "8", 0, -1, 1.0, None, [8]])
def test_max_new_tokens_is_a_whole_number(env, value):
    with pytest.raises(InputError, match="max_new_tokens is"):
        env.decoder.generate([1], max_new_tokens=value)


@pytest.mark.parametrize("row", [[1, True], [True], (False, 1), [np.bool_(True), 2]])
def test_true_is_no_token(env, row):
    with pytest.raises(InputError, match="prompt 0 holds a bool, "):
        env.decoder.prefill([row])
    with pytest.raises(InputError, match="holds a bool, "):
        env.decoder.step(env.pair() if len(row) == 2 else env.state(), row)


@pytest.mark.parametrize("path", ["a" * 300, "a/" * 3000, "\ud800", "latin\udcff", "\0", "", None, 5])
def test_a_path_that_no_file_can_have_is_an_input_error_of_every_function(tmp_path, path):
    good = str(tmp_path)
    for call in (
        lambda: lrt_deploy.open_decoder(path),
        lambda: lrt_deploy.export_bundle(path, tmp_path / "new"),
        lambda: lrt_deploy.export_bundle(good, path),
        lambda: lrt_deploy.build_engine(path),
        lambda: lrt_deploy.parity(path, good),
        lambda: lrt_deploy.parity(good, path),
    ):
        with pytest.raises(InputError):
            call()
