"""Checkpoints on the Hugging Face Hub: `hf://owner/name[@revision][/folder or file]`, fetched by `huggingface_hub`.

Of the repository that was named, only the files of one checkpoint are fetched: its configuration, the weights of the
chosen step, the tokenizer and its chat template. `.pt` and `.pkl` files are among them where the repository has the
authors' layout, because they are parsed and never unpickled. They go where `huggingface_hub` keeps such files
(HF_HOME), and are found there again. Endpoint, token and offline mode are its own too; telemetry is off, and transfers
are plain HTTP, whose bytes are counted while they come.

What a repository may send is bounded: by the listed size of each file, that size by what the file can be at most, and
the weights by the model that the configuration describes.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrt_deploy.errors import CheckpointError, InputError, LRTDeployError
from lrt_deploy.fields import check_path, refuse, shown
from lrt_deploy.files import atomic_write, existing_parent
from lrt_deploy.pickles import MAX_FILE_BYTES
from lrt_deploy.text.tokenizer import source_files, tokenizer_folder

from .checkpoint_folder import CheckpointFiles, find_checkpoint

PREFIX = "hf://"
_NAME = re.compile(
    r"hf://(?P<repository>[\w.-]{1,96}/[\w.-]{1,96})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]{1,200}|[\w.-]{1,200}))?(?:/(?P<inside>[^\0\\]*))?",
    re.ASCII,
)
_KINDS = ("models", "datasets", "spaces", "buckets")  # with which other tools begin such names
_FORM = "hf://owner/name, hf://owner/name@revision, or one of these with /folder or /file of the repository"
_FILE = re.compile(
    r"(?:[\w-][\w.-]{0,200}/){0,8}"  # no folder that begins with a point
    r"(?:config\.json|model\.safetensors|model_\d{1,18}\.pt|meta_\d{1,18}\.json|"
    r"tokenizer\.(?:pkl|json)|tokenizer_config\.json|chat_template\.jinja)",
    re.ASCII,
)
_MOST_FILES = 10_000
_SMALL_BYTES = MAX_FILE_BYTES  # of any file but the weights; readers have narrower limits
_AGAIN = 4  # times a file's size may be received, when a connection breaks again and again
_SHOWN_FILES = 8

Progress = Callable[[str, int, int], None]
MostBytes = Callable[[CheckpointFiles], int]


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint was fetched from: the repository, the revision that was named, and the commit that it is."""

    repository: str
    revision: str | None
    commit: str

    def to_dict(self) -> dict[str, str | None]:
        """Return the fields as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class HubName:
    """A repository, a revision (None: the default branch), and a path inside ("" for all of it)."""

    repository: str
    revision: str | None
    inside: str

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Read `hf://owner/name[@revision][/path]`; raises InputError for any other text."""
        match = _NAME.fullmatch(text)
        inside = ((match and match["inside"]) or "").removesuffix("/")
        if not match or any(part in ("", ".", "..") for part in inside.split("/") if inside):
            raise InputError(f"{shown(text)} is no name on the Hub; expected {_FORM}")
        owner, name = match["repository"].split("/")
        if owner in _KINDS:
            raise InputError(f"{shown(text)} begins with a kind of repository; expected {_FORM}: leave {owner}/ out")
        if any(part[0] in ".-" or part[-1] in ".-" or "--" in part or ".." in part for part in (owner, name)):
            raise InputError(f"{shown(text)} is no name on the Hub: {match['repository']} is no repository's name")
        return cls(match["repository"], match["revision"], inside)

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{PREFIX}{self.repository}{revision}{'/' if self.inside else ''}{self.inside}"


def check_source(value: object, name: str) -> str | Path:
    """Return the argument that names a checkpoint: a name on the Hub as text, anything else as a path."""
    if isinstance(value, str) and value.startswith(PREFIX):
        return str(HubName.parse(value))
    path = check_path(value, name)
    if path.parts[:1] == (PREFIX.rstrip("/"),) and not path.exists():
        refuse(str(value), name, f"a checkpoint; one on the Hub is named as text and not as a Path: {_FORM}")
    return path


def fetch(name: HubName, step: int | None, most_bytes: MostBytes, progress: Progress) -> tuple[CheckpointFiles, Origin]:
    """Return the files of a checkpoint on the Hub, in the cache of `huggingface_hub`, fetching those that lack.

    `step` chooses as in `find_checkpoint`. `most_bytes` is called with the files when all but the weights are there,
    and says how large those may be. Raises CheckpointError; nothing incomplete is left then.
    """
    with _library() as constants, _errors_of(name, constants.ENDPOINT):
        if constants.is_offline_mode():
            return _from_cache(name, step)
        progress(f"looking up {name}", 0, 0)
        commit, listed = _listing(name, constants)
        chosen, others = _choose(name, step, listed)
        download = _Download(name, commit, listed, progress)
        for other in others:
            download.get(other, _SMALL_BYTES)
        folder = download.get(chosen.config.as_posix(), _SMALL_BYTES)
        config = folder / chosen.config
        files = CheckpointFiles(folder / chosen.weights, config, chosen.step, chosen.chosen)
        download.get(chosen.weights.as_posix(), most_bytes(files))
        _remember(folder, name.revision or constants.DEFAULT_REVISION, commit)
        return files, Origin(name.repository, name.revision, commit)


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    """Import `huggingface_hub` and give its constants, with telemetry and transfers beside HTTP switched off."""
    from huggingface_hub import constants

    names = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET")
    before = {name: getattr(constants, name) for name in names}
    try:
        for name in names:
            setattr(constants, name, True)
        yield constants
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


@dataclass(frozen=True)
class _Listed:
    """A file as the Hub lists it."""

    bytes: int
    sha256: str | None  # of files that are stored by git-LFS


def _listing(name: HubName, constants: Any) -> tuple[str, dict[str, _Listed]]:  # noqa: ANN401 - a module
    """Return the commit of the named revision, and its files by name."""
    from huggingface_hub import HfApi

    found = HfApi(library_name="lrt-deploy").model_info(
        name.repository, revision=name.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    commit = str(found.sha)
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise CheckpointError(
            f"{name}: {constants.ENDPOINT} names the commit {shown(found.sha)}, expected 40 hex digits"
        )
    listed = {}
    for file in found.siblings or ():
        if isinstance(file.size, int) and file.size >= 0:
            listed[file.rfilename] = _Listed(file.size, file.lfs.sha256 if file.lfs else None)
    return commit, listed


def _choose(name: HubName, step: int | None, listed: Mapping[str, _Listed]) -> tuple[CheckpointFiles, list[str]]:
    """Return the files of one checkpoint by their names, as paths in the repository, and those of its tokenizer.

    They are chosen as in a folder on the disk: the listed names are laid out as empty files, and searched.
    """
    wanted = list(filter(_FILE.fullmatch, listed))
    if len(wanted) > _MOST_FILES:
        raise CheckpointError(
            f"{name} has {len(wanted)} files of checkpoints; at most {_MOST_FILES} are looked through"
        )
    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve() / "a" / "b" / "repository"  # what is searched above it is empty
        root.mkdir(parents=True)
        for file in wanted:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
        try:
            found = find_checkpoint(root / name.inside, step)
        except CheckpointError as error:
            message = str(error).replace(str(root / name.inside), str(name)).replace(f"{root}/", "")
            held = ", ".join(sorted(listed)[:_SHOWN_FILES]) or "nothing"
            more = ", …" if len(listed) > _SHOWN_FILES else ""
            raise CheckpointError(f"{message}. {name.repository} holds {held}{more}") from error
        if not found.config.exists():
            raise CheckpointError(
                f"{name} has {found.weights.name} and no {found.config.name}, which says what model it is"
            )
        folder = tokenizer_folder(found.weights.parent)
        beside = [] if folder is None else source_files(folder)
        weights, config = found.weights.relative_to(root), found.config.relative_to(root)
        files = CheckpointFiles(weights, config, found.step, found.chosen)
        return files, [path.relative_to(root).as_posix() for path in beside]


@dataclass(frozen=True)
class _Download:
    """Fetches files of one commit into the cache."""

    name: HubName
    commit: str
    listed: Mapping[str, _Listed]
    progress: Progress

    def get(self, file: str, most_bytes: int) -> Path:
        """Fetch a file unless the cache has it; return the commit's folder in the cache."""
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        listed = self.listed[file]
        if listed.bytes > most_bytes:
            raise CheckpointError(
                f"{self.name}: {file} has {listed.bytes} bytes, expected at most {most_bytes}, the most that such a "
                "file of this model can have; it was not fetched"
            )
        cached = isinstance(try_to_load_from_cache(self.name.repository, file, revision=self.commit), str)
        free = shutil.disk_usage(existing_parent(Path(constants.HF_HUB_CACHE) / file)).free
        if not cached and listed.bytes > free:
            raise CheckpointError(
                f"{self.name}: {file} has {listed.bytes} bytes, and {free} are free for {constants.HF_HUB_CACHE}; make "
                "room, or name a folder on another disk by HF_HOME"
            )
        received = _Received(f"{self.name}: {file}", listed.bytes, self.progress)
        bar: Any = lambda **_: received  # noqa: E731 - called in place of a class of progress bars
        path = hf_hub_download(
            self.name.repository,
            file,
            revision=self.commit,
            library_name="lrt-deploy",
            tqdm_class=bar,
        )
        self._check(Path(path), file, fetched=not cached)
        return Path(path).parents[file.count("/")]

    def _check(self, path: Path, file: str, fetched: bool) -> None:
        """Compare a file in the cache with the listing; one that was fetched and differs is removed."""
        listed, found = self.listed[file], path.stat().st_size
        wrong = None if found == listed.bytes else f"{found} bytes, and the Hub lists {listed.bytes}"
        if wrong is None and fetched and listed.sha256 is not None:
            with path.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            wrong = None if digest == listed.sha256 else f"the SHA-256 {digest}, and the Hub lists {listed.sha256}"
        if wrong is None:
            return
        if fetched:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise CheckpointError(f"{self.name}: {file} came with {wrong}; it was removed. Try again")
        raise CheckpointError(f"{path} in the cache has {wrong}; remove it, and it is fetched again")


class _Received:
    """Counts the bytes of a file while they come, as `huggingface_hub` reports them to a progress bar."""

    def __init__(self, what: str, size: int, progress: Progress) -> None:
        self._what, self._size, self._progress = what, size, progress
        self._held = self._ever = 0

    def __enter__(self) -> _Received:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: float | None = 1) -> None:
        """Count bytes that were received; negative: they are received again. Raises CheckpointError for too many."""
        self._held += int(count or 0)
        self._ever += max(0, int(count or 0))
        if self._held > self._size:
            raise CheckpointError(f"{self._what} is larger than the {self._size} bytes that the Hub lists; it was left")
        if self._ever > _AGAIN * self._size:
            raise CheckpointError(
                f"{self._what} was sent {_AGAIN} times, and the connection broke each time; try again later"
            )
        self._progress(f"fetching {self._what}", self._held, self._size)


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Note in the cache which commit a revision is, as `huggingface_hub` does, for when it is offline."""
    if revision == commit:
        return
    note = folder.parent.parent / "refs" / revision
    with contextlib.suppress(OSError):  # a cache that cannot be written is used as it is
        if not note.is_file() or note.read_text(encoding="utf-8") != commit:
            note.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(note) as partial:
                partial.write_text(commit, encoding="utf-8")


def _from_cache(name: HubName, step: int | None) -> tuple[CheckpointFiles, Origin]:
    """Find a checkpoint in the cache alone."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name.repository, revision=name.revision, local_files_only=True))
    return find_checkpoint(folder / name.inside, step), Origin(name.repository, name.revision, folder.name)


@contextlib.contextmanager
def _errors_of(name: HubName, endpoint: str) -> Iterator[None]:
    """Raise CheckpointError for what `huggingface_hub` raises."""
    from huggingface_hub import errors

    # The base of its HTTP library's errors, which are no OSError; which library that is depends on the version.
    transport: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except LRTDeployError:
        raise
    except (errors.HfHubHTTPError, transport, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{name}: {_reason(error, name, endpoint)}") from error


def _reason(error: Exception, name: HubName, endpoint: str) -> str:
    """Say what is wrong, and what to do."""
    from huggingface_hub import constants, errors

    log_in = "log in by `hf auth login`, or put a token into HF_TOKEN"
    offline = "HF_HUB_OFFLINE=1 takes what the cache holds"
    transport: Any = errors.HfHubHTTPError.__bases__[0]
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, errors.GatedRepoError):
        return f"its owner admits users one by one; ask for it on {endpoint}/{name.repository}, then {log_in}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{name.repository} has no revision {name.revision}; expected a branch, a tag or a commit of it"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"{endpoint} has no such repository, or shows it to its owners only; check the name, or {log_in}"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        return f"{endpoint} answers with {status}; " + (log_in if status in (401, 403) else "try again later")
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) and constants.is_offline_mode():
        return f"it is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch it"
    said = " ".join(str(cause).split())[:300] or type(cause).__name__
    if isinstance(cause, transport):
        return f"{endpoint} cannot be reached or broke off ({said}); check the connection, or {offline}"
    return f"it cannot be fetched from {endpoint}: {said}"
