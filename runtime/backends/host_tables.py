"""Embedding tables on the host: mapped from the bundle's file, and the rows of the new tokens gathered from them.

For bundles whose graphs take rows instead of token ids (see `contract.embedding_inputs`). Rows are widened to float32,
exactly. Ids have been checked before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - makes bfloat16 a type of NumPy's
import numpy as np
from numpy.typing import NDArray

from lrt_deploy.bundle.manifest import Manifest, table_path
from lrt_deploy.errors import BundleError
from lrt_deploy.types import IntArray

Rows = dict[str, NDArray[Any]]  # graph input -> (B, T, columns) float32


class HostTables:
    """The tables of a precision by the graph inputs that their rows are for; none where the graphs hold them."""

    def __init__(self, tables: dict[str, NDArray[Any]]) -> None:
        self.tables = tables

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, precision: str) -> HostTables:
        """Map the tables of a bundle; nothing is read yet."""
        path, records = folder / table_path(precision), manifest.tables.get(precision, {})
        try:
            return cls({n: np.asarray(np.memmap(path, r.dtype, "r", r.offset, r.shape)) for n, r in records.items()})
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot map the embedding tables in {path}: {error}; export the bundle again") from error

    def __bool__(self) -> bool:
        return bool(self.tables)

    @property
    def columns(self) -> dict[str, int]:
        """Numbers in a row, by graph input."""
        return {name: table.shape[1] for name, table in self.tables.items()}

    def take(self, ids: IntArray, rows: Rows) -> None:
        """Fill `rows`, (*ids.shape, columns) each, with what the tables hold for `ids`."""
        for name, found in rows.items():
            found[...] = self.tables[name][ids]


class RowArrays:
    """Arrays that the rows of one call at a time are put in. Calls of all shapes share memory of the largest's size."""

    def __init__(self, tables: HostTables) -> None:
        self._columns = tables.columns
        self._memory: Rows = {name: np.zeros(0, np.float32) for name in self._columns}

    def of(self, batch: int, count: int) -> Rows:
        """(batch, count, columns) for each table."""
        rows = {}
        for name, columns in self._columns.items():
            size = batch * count * columns
            if self._memory[name].size < size:
                self._memory[name] = np.zeros(size, np.float32)  # earlier calls keep the smaller one
            rows[name] = self._memory[name][:size].reshape(batch, count, columns)
        return rows
