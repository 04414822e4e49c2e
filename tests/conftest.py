"""What the tests of the core share: the goldens, each exported once and opened once.

Exports take seconds, so every test process of a session takes them from one folder, guarded by lock files; this works
for plain `pytest` and for `pytest -n N`. Nothing heavy is imported before a test asks for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest

# A shell ignores SIGINT in what it starts in the background, and the processes that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Matrices here are small: torch's second thread costs more than it brings, and much more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data" / "golden"
TINY = tuple(sorted(folder.name for folder in GOLDEN.iterdir()))
# The trained golden: the demo's checkpoint, or another one with its `golden.npz` in the same folder.
TRAINED = "demo"
OTHER_TRAINED = os.environ.get("LRT_DEPLOY_GOLDEN")
CAPACITIES = {"no_x0": 640, TRAINED: 640}  # for the long rollouts; all others
CAPACITY = 128
EXPORT_SECONDS = 400


@dataclass(frozen=True)
class Golden:
    """A checkpoint of the authors and what their own code computed from it."""

    name: str
    folder: Path
    """Of the checkpoint."""
    recording: Path

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.recording) as file:
            return dict(file)

    @property
    def ids(self) -> np.ndarray:
        """(B, T)"""
        return self.arrays["ids"]

    @cached_property
    def has_memory(self) -> bool:
        fields = json.loads(str(self.arrays["config_json"]))
        return fields["use_interleaved"] or fields["use_multi_refine"]

    @property
    def last_logits(self) -> np.ndarray:
        """(B, n, V) of the sequential run, for the last n positions; n = T except in the trained one."""
        return self.arrays.get("seq_logits", self.arrays.get("seq_logits_last32"))

    def greedy_runs(self) -> list[tuple[list[int], list[int]]]:
        """All (prompt, continuation) pairs."""
        names = [name for name in self.arrays if name.startswith("prompt")]
        return [(self.arrays[n].tolist(), self.arrays[n.replace("prompt", "greedy")].tolist()) for n in names]

    def model(self):
        """A fresh reference model, which the test may change."""
        from lrt_deploy.model.checkpoint import open_checkpoint

        return open_checkpoint(self.folder).model()


def find_golden(name: str) -> Golden:
    assert name in (*TINY, TRAINED)
    if name == TRAINED and OTHER_TRAINED is None:
        return Golden(name, ROOT / "demo" / "checkpoint", GOLDEN.parent / "demo_golden.npz")
    folder = GOLDEN / name if name in TINY else Path(OTHER_TRAINED)
    return Golden(name, folder, folder / "golden.npz")


@dataclass(frozen=True)
class GoldenLimits:
    """Limits against the numbers that the authors' own code computed.

    `zero_memory` is the opposite: the smallest error that a forgotten memory must cause.
    """

    logits: float
    latent: float
    cache: float
    nll: float
    bits_per_byte: float
    zero_memory: float


# Measured over all goldens and positions: logits 1.0e-5, latent 4.8e-6, caches 4.3e-6, nats 1.3e-5, bits per byte
# 2.9e-6. The smallest fault that they are to catch, another RMSNorm eps, moves the logits of the trained one by
# 2e-4. Zero memory moves logits by 1 to 10 and bits per byte by 7e-2 or more.
GOLDEN_LIMITS = GoldenLimits(logits=5e-5, latent=2e-5, cache=2e-5, nll=5e-5, bits_per_byte=1e-5, zero_memory=0.1)


@pytest.fixture(scope="session", autouse=True)
def _clean_user_cache(tmp_path_factory):
    """Remembered hashes of test bundles do not belong into the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def file_size_limit():
    """A context in which no file can be made larger than some bytes, as on a full disk or after `ulimit -f`."""
    import contextlib
    import resource

    @contextlib.contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tolerances():
    return GOLDEN_LIMITS


@pytest.fixture(scope="session")
def tiny_names() -> tuple[str, ...]:
    return TINY


@pytest.fixture(scope="session")
def golden_of():
    """name -> Golden."""
    found: dict[str, Golden] = {}

    def get(name: str) -> Golden:
        if name not in found:
            found[name] = find_golden(name)
        return found[name]

    return get


@pytest.fixture(scope="session", params=(*TINY, TRAINED))
def golden(request, golden_of) -> Golden:
    """Every golden in turn."""
    return golden_of(request.param)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for all processes of this test session."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "exported"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def make_once(shared_folder):
    """(name, make) -> folder: calls make(folder) in the first process that asks; the others wait for it."""

    def once(name: str, make) -> Path:
        folder, made, failure = (shared_folder / f"{name}{end}" for end in ("", ".made", ".failed"))
        try:
            os.close(os.open(shared_folder / f"{name}.lock", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            deadline = time.monotonic() + EXPORT_SECONDS
            while not made.exists():  # the folder alone may be half full
                assert not failure.exists(), f"making {name} failed before: {failure.read_text()}"
                assert time.monotonic() < deadline, f"{name} was not made within {EXPORT_SECONDS} s"
                time.sleep(0.05)
            return folder
        try:
            make(folder)
        except BaseException as error:
            failure.write_text(f"{type(error).__name__}: {error}")
            raise
        made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def kernels_once(make_once):
    """Path of the GPU's kernels as a library for the host, compiled by g++; skips where there is none."""
    from host_kernels import MISSING, compile_kernels

    if MISSING:
        pytest.skip(MISSING)

    def make(folder: Path) -> None:
        folder.mkdir()
        compile_kernels(folder)

    return make_once("kernels", make) / "kernels.so"


@pytest.fixture(scope="session", autouse=True)
def _kernels_of_the_fake(request):
    """A fake of CUDA's driver takes the kernels when it is asked for them."""
    sys.path.insert(0, str(Path(__file__).parent))
    from fake_cuda import FakeDriver

    def library():
        from host_kernels import HostKernels

        return HostKernels(request.getfixturevalue("kernels_once"), threads=2)

    FakeDriver.library = staticmethod(cache(library))


@pytest.fixture(scope="session")
def export_once(make_once, golden_of):
    """name -> bundle folder of a golden. Tests must not change it: they copy it first."""

    def export(name: str) -> Path:
        import lrt_deploy

        source, capacity = golden_of(name).folder, CAPACITIES.get(name, CAPACITY)
        return make_once(name, lambda folder: lrt_deploy.export_bundle(source, folder, max_seq_len=capacity))

    return export


@pytest.fixture(scope="session")
def host_embeddings_once(make_once, golden_of):
    """(name, precisions) -> the same with its embedding tables on the host, int4 rounded as `in_every_precision`'s.

    Tests must not change it.
    """

    def export(name: str, precisions=("fp32",)) -> Path:
        import lrt_deploy

        def make(folder: Path) -> None:
            options = {"precision": precisions, "max_seq_len": CAPACITY, "host_embeddings": True, "compensate": False}
            lrt_deploy.export_bundle(golden_of(name).folder, folder, **options)

        return make_once(f"{name}-host-{'-'.join(precisions)}", make)

    return export


@pytest.fixture(scope="session")
def in_every_precision(make_once, golden_of):
    """Name of a golden -> bundle folder with all precisions, traced once. Tests must not change it.

    Int4 weights are rounded to nearest: a fault of one step in a matrix shows.
    """

    def export(name: str) -> Path:
        import lrt_deploy
        from lrt_deploy.bundle.precisions import PRECISIONS

        capacity = 256 if name == TRAINED else CAPACITY

        def make(folder: Path) -> None:
            options = {"precision": PRECISIONS, "max_seq_len": capacity, "compensate": False}
            lrt_deploy.export_bundle(golden_of(name).folder, folder, **options)

        return make_once(f"precisions-{name}", make)

    return export


@pytest.fixture(scope="session")
def export_model(make_once):
    """(name, model, options) -> bundle folder of a model that was made in a test; `model` is called when needed."""

    def export(name: str, model, **options) -> Path:
        from random_models import write_native

        import lrt_deploy

        def make(folder: Path) -> None:
            checkpoint = folder.with_name(f"{name}.checkpoint")
            write_native(model(), checkpoint)
            lrt_deploy.export_bundle(checkpoint, folder, **options)

        return make_once(name, make)

    return export


@pytest.fixture(scope="session")
def int4_in_blocks(export_model):
    """block -> bundle of a random model in int4, its checkpoint beside it; 64 is compensated. Tests must not change it.

    The model is wide enough for blocks of 128; of another `width`, its last blocks may not be full.
    """

    def export(block: int | None, width: int = 128) -> Path:
        from random_models import random_model

        from lrt_deploy.config import LRTConfig

        config = LRTConfig(sequence_len=64, vocab_size=128, n_layer=2, n_head=2, n_kv_head=1, n_embd=width)
        options = {"precision": "int4-weight-only", "int4_block": block, "compensate": block == 64}
        return export_model(f"int4-{block}-{width}", lambda: random_model(config, seed=1), **options)

    return export


@pytest.fixture(scope="session")
def decoder_of(export_once):
    """name -> opened decoder of a golden, shared by all tests of the process."""
    import lrt_deploy

    opened = {}

    def get(name: str):
        if name not in opened:
            opened[name] = lrt_deploy.open_decoder(export_once(name))
        return opened[name]

    yield get
    for decoder in opened.values():
        decoder.close()


@pytest.fixture(scope="module")
def package_of(tmp_path_factory):
    """(bundle, target) -> the folder of a package of it."""
    from lrt_deploy.exporters.packages.package import package_bundle

    def make(bundle, target):
        folder = tmp_path_factory.mktemp(target) / "package"
        package_bundle(bundle, folder, target)
        return folder

    return make
