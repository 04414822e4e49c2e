"""`parity --check` and `--golden`: a bundle's decoder against itself or a recording, without a checkpoint.

See `lrt_deploy.evaluation.checks` and `lrt_deploy.evaluation.recorded`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options, output

if TYPE_CHECKING:
    from lrt_deploy.runtime.decoder import Decoder

STEPS = 16


def run_checks(
    bundle: Path,
    decoder: Decoder,
    runner: options.Runner,
    names: Sequence[str],
    prompt: list[int],
    tolerance: float | None,
) -> list[dict[str, Any]]:
    """The JSON fields of each check, in the order asked for."""
    from lrt_deploy.evaluation.checks import CHECKS, Setting, chosen
    from lrt_deploy.tolerances import limits

    with contextlib.ExitStack() as opened:
        setting = Setting(
            prompt,
            max(1, min(STEPS, decoder.max_seq_len - len(prompt))),
            limits(decoder.precision),
            tolerance,
            decoder.manifest.max_batch_size,
            lambda: opened.enter_context(dataclasses.replace(runner, cuda_graph=False).open(bundle)),
        )
        return [CHECKS[name](decoder, setting).to_dict() for name in chosen(names, decoder.backend)]


def against_golden(decoder: Decoder, golden: Path, quiet: bool) -> dict[str, Any]:
    """The JSON fields of the comparison with recorded arrays."""
    from lrt_deploy.evaluation.recorded import compare_with_recording, read_recording
    from lrt_deploy.tolerances import limits

    recording = read_recording(golden, decoder.config)
    with output.progress(quiet) as progress:
        return compare_with_recording(decoder, recording, limits(decoder.precision), progress).to_dict()


def document(decoder: Decoder, checks: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON fields of a run without a checkpoint."""
    failed = [check["name"] for check in checks if not check["passed"]]
    return {
        "passed": not failed,
        "verdict": f"FAIL: {', '.join(failed)}" if failed else f"PASS: {len(checks)} of {len(checks)} checks",
        "backend": decoder.backend,
        "precision": decoder.precision,
        "checks": checks,
    }


def joined(fields: dict[str, Any], checks: list[dict[str, Any]]) -> dict[str, Any]:
    """A comparison with a checkpoint, with the checks made beside it; a failed one fails the whole. In place."""
    fields["checks"] = checks
    fields["passed"] = bool(fields["passed"]) and all(check["passed"] for check in checks)
    return fields
