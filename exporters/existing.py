"""The bundle that an export adds precisions to: what must fit, which files are taken over, and the joined manifest.

The new bundle is made beside the old one and exchanged with it, as by every export. What the old one holds is taken
over by hard links, or copied where the filesystem has none, so a process that has files of it open or mapped keeps
them. Engines and reports are taken over at the last moment, because others may write them meanwhile.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lrt_deploy.bundle import manifest
from lrt_deploy.bundle.manifest import Manifest
from lrt_deploy.errors import BundleError, ExportError
from lrt_deploy.files import read_bytes

from .export_options import ExportRequest

if TYPE_CHECKING:
    from lrt_deploy.model.checkpoint import Checkpoint

_DIGEST_BYTES = 2**10
_OWN = (manifest.MANIFEST, manifest.DIGEST)  # written again


@dataclass(frozen=True)
class ExistingBundle:
    """A whole bundle, whose files were verified, and the digest of its manifest."""

    folder: Path
    manifest: Manifest
    digest: bytes

    @classmethod
    def open(cls, folder: Path, options: ExportRequest) -> ExistingBundle:
        """Read the bundle; raise ExportError for options that contradict it, BundleError if it is not intact."""
        if options.force or options.tokenizer is not None:
            given = "force" if options.force else "tokenizer"
            raise ExportError(f"--add (add=True) keeps what the bundle has, so leave --{given} ({given}=…) out")
        if not os.path.lexists(folder):
            raise ExportError(f"{folder} does not exist; --add (add=True) puts precisions into an existing bundle")
        digest = _read_digest(folder)
        found = manifest.read_manifest(folder)
        if present := [name for name in options.precisions if name in found.precisions]:
            raise ExportError(
                f"{folder} has {', '.join(present)} already; it holds {', '.join(found.precisions)}. To make one "
                "again, export the whole bundle with --force (force=True)"
            )
        wanted = {
            "max_seq_len": (options.max_seq_len, found.max_seq_len),
            "max_batch_size": (options.max_batch_size, found.max_batch_size),
            "host_embeddings": (options.host_embeddings or None, found.host_embeddings),
        }
        for name, (asked, has) in wanted.items():
            if asked is not None and asked != has:
                raise ExportError(
                    f"{name} is {asked}, and {folder} was exported with {has}; all precisions of a bundle share it: "
                    "leave the option out, or export a bundle of its own"
                )
        manifest.verify_files(folder, found)
        return cls(folder, found, digest)

    def complete(self, options: ExportRequest, checkpoint: Checkpoint) -> ExportRequest:
        """Return the options with the bundle's values; raise ExportError if the checkpoint is another one."""
        exported_from = self.manifest.provenance.get("checkpoint", {}).get("sha256")
        if checkpoint.sha256 != exported_from:
            raise ExportError(
                f"{checkpoint.model_file} has the SHA-256 {checkpoint.sha256}, and {self.folder} was exported from a "
                f"checkpoint with {exported_from}; precisions of one bundle are of one checkpoint"
            )
        theirs, ours = checkpoint.config.to_dict(), self.manifest.model.to_dict()
        if changed := next((name for name in ours if theirs.get(name) != ours[name]), None):
            raise ExportError(
                f"the configuration of {checkpoint.model_file} says {changed} {theirs.get(changed)}, and "
                f"{self.folder} was exported with {ours[changed]}; precisions of one bundle are of one model"
            )
        return replace(
            options,
            max_seq_len=self.manifest.max_seq_len,
            max_batch_size=self.manifest.max_batch_size,
            host_embeddings=self.manifest.host_embeddings,
        )

    def take_files(self, folder: Path) -> None:
        """Take over the files that the manifest lists."""
        for name in self.manifest.files:
            _take(self.folder / name, folder / name)

    def take_rest(self, folder: Path) -> None:
        """Take over all else, engines for instance; raise ExportError if the bundle is no longer the one opened."""
        if _read_digest(self.folder) != self.digest:
            raise ExportError(f"{self.folder} was replaced while a precision was added; nothing was changed: try again")
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            is_folder = path.is_dir() and not path.is_symlink()
            if not is_folder and name.as_posix() not in self.manifest.files and str(name) not in _OWN:
                _take(path, folder / name)
        for name in (Path(), *(path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_dir())):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                shutil.copymode(self.folder / name, folder / name)

    def join(self, added: Manifest) -> Manifest:
        """Return the manifest of the old precisions and the added ones, without the added files."""
        old, details = self.manifest, {name: dict(added.precision_details[name]) for name in added.precisions}
        measured = added.precision_details.get("calibration")
        shared = old.precision_details.get("calibration", measured)
        if measured and measured != shared:  # on another text than the precisions that were there
            details |= {name: found | {"calibration": measured} for name, found in details.items()}
        if shared:
            details["calibration"] = shared
        versions: dict[str, Any] = dict.fromkeys(added.precisions, added.provenance["versions"])
        return msgspec.structs.replace(
            old,
            precisions=(*old.precisions, *added.precisions),
            contracts=old.contracts | added.contracts,
            precision_details=old.precision_details | details,
            tables=old.tables | added.tables,
            provenance=old.provenance | {"added": old.provenance.get("added", {}) | versions},
        )


def _read_digest(folder: Path) -> bytes:
    """Return the content of the digest's file; empty if there is none."""
    if not os.path.lexists(folder / manifest.DIGEST):
        return b""
    return read_bytes(folder / manifest.DIGEST, "the manifest's digest", BundleError, _DIGEST_BYTES)


def _take(source: Path, target: Path) -> None:
    """Link or copy a file, or a link, in place of what an earlier try left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # no hard links here, or not for another user's files
        shutil.copy2(source, target, follow_symlinks=False)
