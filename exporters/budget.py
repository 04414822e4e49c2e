"""Which matrices must stay precise so that a quantized model keeps within a budget of KL: the shortest list that does.

Quantization is simulated: the reference decodes real text with matrices that went through the exporter's own grids and
back, token by token with the latent fed back, and its next-token distributions are held against its own in float32.
First every matrix is quantized alone, which ranks them by KL per byte; then all are quantized and the worst are put
back, one by one, until the budget is met; then whatever turns out not to be needed is quantized again. KL does not add
up over matrices, so every step is measured.

Weights alone are simulated: int8 activations depend on scales that `calibration` measures. Exports nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrt_deploy.errors import ParityError
from lrt_deploy.model import LRT
from lrt_deploy.reference import ReferenceDecoder
from lrt_deploy.weights import matrix_shapes

from .calibration import calibrate
from .compensate import Doubles, compensated
from .quantize import FORMATS, Floats, Format, dequantized, format_of, rounded

# Called with what is being done, and done and total of it.
Progress = Callable[[str, int, int], None]
ROWS, ROW_TOKENS = 8, 128  # of the text that is judged, decoded together


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one matrix alone costs, in mean KL; `share` is its part of the weights in matrices."""

    matrix: str
    mean_kl: float
    share: float


@dataclass(frozen=True)
class Fit:
    """The list that was found. `quantized_share` is the part of the weights in matrices that is quantized with it."""

    precision: str
    budget: float
    met: bool
    keep_high: tuple[str, ...]
    mean_kl: float
    quantized_share: float
    mean_kl_all_quantized: float
    mean_kl_round_to_nearest: float
    sensitivities: tuple[Sensitivity, ...]
    tokens: int
    compensated: bool  # whether int4 rounding was, as `export --compensate` does it
    block: int | None  # rows of a column that share a scale; None: all

    @property
    def line(self) -> str:
        """What was found, for people."""
        kept = ", ".join(self.keep_high) or "none"
        word = "PASS" if self.met else "FAIL"
        return (
            f"{word}: {self.precision} with {self.quantized_share:.1%} of the weights quantized has a mean KL of "
            f"{self.mean_kl:.1e} (budget {self.budget:.1e}; all quantized {self.mean_kl_all_quantized:.1e}, plain "
            f"rounding {self.mean_kl_round_to_nearest:.1e}); keep high: {kept}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self)


def fit_budget(
    model: LRT,
    precision: str,
    budget: float,
    rows: Sequence[Sequence[int]],
    progress: Progress = lambda what, done, total: None,
    int4_block: int | None = None,
) -> Fit:
    """Search for the list; `rows` are token ids of one length, two or more. Leaves `model` as it was.

    `int4_block` is the block that int4 weights are exported with, None for the default.

    Every other row is judged. The rest calibrates int4 rounding, so that nothing is judged on what it was fitted to.

    Raises ParityError for a precision whose weights alone do not decide its quality.
    """
    kind = format_of(precision, int4_block)
    if kind is None or kind.activations:
        fitting = ", ".join(name for name, form in FORMATS.items() if not form.activations)
        raise ParityError(f"a budget can be fitted for {fitting}, not for {precision}: only weights are simulated")
    if not budget > 0:
        raise ParityError(f"the KL budget is {budget}, expected more than 0")
    shapes = {name: a * b for name, (a, b) in matrix_shapes(model.config).items()}
    names = list(shapes)
    if len(rows) < 2:
        raise ParityError(f"the text gives {len(rows)} row(s) of tokens, expected 2 or more: give a longer one")
    moments = calibrate(model, rows[1::2], progress, moments=True).moments if kind.bits == 4 else {}
    simulation = _Simulation(model, kind, rows[::2], moments)
    try:
        plain = simulation.mean_kl(names, shares=(1.0,))
        alone = {}
        for i, name in enumerate(names):
            progress("quantizing each matrix alone", i, len(names))
            alone[name] = simulation.mean_kl([name])
        all_quantized = simulation.mean_kl(names)
        ranked = sorted(names, key=lambda name: alone[name] / shapes[name], reverse=True)
        keep, found = _search(simulation, ranked, budget, all_quantized, progress)
        keep, found = _prune(simulation, names, keep, (budget, found), shapes)
    finally:
        simulation.restore()
    total = sum(shapes.values())
    return Fit(
        precision=precision,
        budget=budget,
        met=found <= budget,
        keep_high=tuple(name for name in shapes if name in keep),
        mean_kl=found,
        quantized_share=sum(shapes[name] for name in names if name not in keep) / total,
        mean_kl_all_quantized=all_quantized,
        mean_kl_round_to_nearest=plain,
        sensitivities=tuple(Sensitivity(name, alone[name], shapes[name] / total) for name in ranked),
        tokens=sum(len(row) for row in simulation.rows),
        compensated=bool(moments),
        block=kind.block,
    )


def _search(
    simulation: _Simulation, ranked: Sequence[str], budget: float, found: float, progress: Progress
) -> tuple[list[str], float]:
    """Put matrices back in this order until the budget is met, or all are back."""
    keep: list[str] = []
    for i, name in enumerate(ranked):
        if found <= budget:
            break
        progress("searching for the shortest list", i, len(ranked))
        keep.append(name)
        found = simulation.mean_kl([other for other in ranked if other not in keep])
    return keep, found


def _prune(
    simulation: _Simulation,
    names: Sequence[str],
    keep: list[str],
    measured: tuple[float, float],
    sizes: dict[str, int],
) -> tuple[list[str], float]:
    """Quantize again what is not needed, the largest first; `measured` is the budget and what the list reaches."""
    budget, found = measured
    for name in sorted(keep, key=sizes.__getitem__, reverse=True):
        fewer = [other for other in keep if other != name]
        trial = simulation.mean_kl([other for other in names if other not in fewer])
        if trial <= budget:
            keep, found = fewer, trial
    return keep, found


class _Simulation:
    """The model with some of its matrices rounded, against itself, on rows of tokens."""

    def __init__(self, model: LRT, kind: Format, rows: Sequence[Sequence[int]], moments: Mapping[str, Doubles]) -> None:
        length = min(ROW_TOKENS, len(rows[0]))
        self.rows = [list(row[:length]) for row in rows[:ROWS]]
        self._model, self._kind, self._ops, self._moments = model, kind, model.ops, moments
        self._exact: dict[str, torch.Tensor] = {}  # of the matrices that are rounded now
        self._known: dict[str, Floats] = {}  # compensation takes seconds
        self._expected = self._log_probabilities()

    def mean_kl(self, names: Collection[str], shares: Sequence[float] | None = None) -> float:
        """With exactly these matrices rounded; over all positions of all rows, both sides with their own state."""
        if shares is not None:
            self.restore()
        for name in [name for name in self._exact if name not in names]:
            self._model.get_parameter(name).data = self._exact.pop(name)
        for name in [name for name in names if name not in self._exact]:
            parameter = self._model.get_parameter(name)
            self._exact[name] = parameter.data
            parameter.data = torch.from_numpy(self._rounded(name, parameter.data.numpy(), shares))
        kl = sum(self._kl(p, q) for p, q in zip(self._expected, self._log_probabilities(), strict=True))
        if shares is not None:
            self.restore()
        return kl / len(self._expected)

    def _rounded(self, name: str, matrix: Floats, shares: Sequence[float] | None) -> Floats:
        """As an export stores it; with `shares`, to nearest."""
        if shares is not None:
            return rounded(matrix, self._kind, shares)
        if name not in self._moments:
            return rounded(matrix, self._kind)
        if name not in self._known:
            self._known[name] = dequantized(*compensated(matrix, self._moments[name], self._kind), self._kind)
        return self._known[name]

    def restore(self) -> None:
        """All matrices as they were."""
        for name, exact in self._exact.items():
            self._model.get_parameter(name).data = exact
        self._exact.clear()
        self._model.ops = self._ops

    def _log_probabilities(self) -> list[torch.Tensor]:
        """(B, V) after each token, float32."""
        decoder = ReferenceDecoder(self._model, max_seq_len=len(self.rows[0]))
        state = decoder.prefill([row[:1] for row in self.rows])
        found = [state.next_logits.log_softmax(-1)]
        for t in range(1, len(self.rows[0])):
            decoder.step(state, [row[t] for row in self.rows])
            found.append(state.next_logits.log_softmax(-1))
        return found

    @staticmethod
    def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
        """Mean over rows, in float64."""
        p, q = p.double(), q.double()
        return float((p.exp() * (p - q)).sum(-1).mean())
