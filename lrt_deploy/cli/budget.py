"""`parity --fit-budget`: which matrices a quantized bundle should keep precise. See `lrt_deploy.exporters.budget`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrt_deploy.precisions import INT4_BLOCKS

from . import output

if TYPE_CHECKING:
    from lrt_deploy.checkpoint import Checkpoint
    from lrt_deploy.runtime.decoder import Decoder


def fitted(
    decoder: Decoder, opened: Checkpoint, budget: float, text: Path | None, progress: output.Progress
) -> dict[str, Any]:
    """The JSON fields of the search for the precision that the decoder runs, in the blocks that its bundle has."""
    from lrt_deploy.exporters.budget import fit_budget
    from lrt_deploy.exporters.calibration_text import calibration_rows

    rows = calibration_rows(text, decoder.tokenizer, decoder.config.vocab_size, decoder.max_seq_len)
    block = decoder.manifest.precision_details.get(decoder.precision, {}).get("block")
    fit = fit_budget(opened.model(decoder.max_seq_len), decoder.precision, budget, rows.tokens, progress, block)
    kept = "".join(f" --keep-high {name}" for name in fit.keep_high or ("none",))
    compensate = " --compensate" if fit.compensated else ""
    blocks = "" if block in (None, INT4_BLOCKS[0]) else f" --int4-block {block}"
    return {
        "passed": fit.met,
        "verdict": fit.line,
        "backend": decoder.backend,
        "precision": decoder.precision,
        "fit": fit.to_dict(),
        "export_options": f"--precision {fit.precision}{blocks}{kept}{compensate}",
    }


def show(fields: dict[str, Any], json: bool) -> None:
    """The document, or the list and what each matrix costs."""
    if json:
        output.document(fields)
        return
    output.answer(fields["verdict"])
    output.answer(f"export with {fields['export_options']}")
    output.table(
        {
            item["matrix"]: f"mean KL {item['mean_kl']:.1e} alone, {item['share']:.1%} of the weights"
            for item in fields["fit"]["sensitivities"]
        }
    )
