"""The options of `parity` alone, each declared once; what several verbs share is in `options`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from . import options

Checkpoint = Annotated[
    Path | None, typer.Option(metavar="CHECKPOINT", help="The checkpoint to compare with.", show_default=False)
]
CheckpointStep = Annotated[int | None, typer.Option(help="Which saved step of it; default: the last.")]
Steps = Annotated[
    int | None, typer.Option(help="Decode steps after the prompt; default: 128, or what the capacity leaves.")
]
# The names of `lrt_deploy.evaluation.checks`; a test holds them against it.
CheckName = Literal[
    "fixed-point-vs-stepwise", "chunked-vs-whole", "batch-vs-alone", "restored-vs-straight", "cuda-graph", "all"
]
if TYPE_CHECKING:
    _CheckItem = str
else:
    _CheckItem = StrEnum("_CheckItem", [(name, name) for name in get_args(CheckName)])
Check = Annotated[
    list[_CheckItem] | None,
    typer.Option(
        metavar="NAME",
        help=f"Check the decoder against itself: {options.listed(CheckName)}; repeatable, needs no checkpoint.",
    ),
]
Golden = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.npz", help="Compare with recorded logits and latents; needs no checkpoint.", show_default=False
    ),
]
Bisect = Annotated[bool, typer.Option("--bisect", help="Name the first position, layer, tensor and op that differ.")]
MaxKl = Annotated[
    float | None,
    typer.Option(metavar="KL", help="Largest mean KL in nats, in precisions judged by quality.", show_default=False),
]
MinAgreement = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Smallest share of equal first choices, 0 to 1, likewise.", show_default=False),
]
Report = Annotated[bool, typer.Option("--report", help="Write a page and pictures to BUNDLE/reports.")]
ReportDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Write them there instead.", show_default=False)]
Float64 = Annotated[
    bool, typer.Option("--float64", help="Run the reference in float64, to see its own rounding drop out.")
]
