"""The smoke test after a build: the new engine decodes a short rollout beside ONNX Runtime on the CPU.

Stateful, because a one-step check sees neither drift nor a cache that is written in the wrong place; short, because it
is no proof of quality (that is `parity`'s). Where there is no GPU, it says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrt_deploy.errors import LRTDeployError, ParityError

from .output import Progress

_PROMPT_TOKENS, _STEPS = 12, 32


def smoke_test(bundle: Path, backend: str, precision: str, progress: Progress) -> dict[str, Any]:
    """What came of it, for the sidecar: `ran`, and `reason` or `passed`, `verdict` and the numbers behind it."""
    from lrt_deploy import open_decoder
    from lrt_deploy.bundle.manifest import read_manifest
    from lrt_deploy.evaluation import comparison
    from lrt_deploy.gpu import find_gpu

    gpu, reason = find_gpu()
    if gpu is None:
        return {"ran": False, "reason": reason}
    manifest = read_manifest(bundle)
    steps = min(_STEPS, manifest.max_seq_len - _PROMPT_TOKENS)
    if steps < 1:
        return {"ran": False, "reason": f"a capacity of {manifest.max_seq_len} tokens is too small for it"}
    prompt = [(7919 * i + 13) % manifest.model.vocab_size for i in range(_PROMPT_TOKENS)]
    try:
        with open_decoder(bundle, "ort-cpu") as reference, open_decoder(bundle, backend, precision) as decoder:
            report = comparison.compare(
                reference,
                decoder,
                prompt,
                steps,
                precision=precision,
                checkpoint_matches=None,
                backend=backend,
                prefill="stepwise",
                progress=progress,
            )
            beside = f"{reference.backend} in {reference.precision}"
    except ParityError as error:  # a comparison that could not be made
        return {"ran": False, "reason": str(error)}
    except LRTDeployError as error:
        return {"ran": True, "passed": False, "gpu": gpu.name, "verdict": str(error)}
    numbers = ("max_abs_logit_error", "max_abs_latent_error", "mean_kl", "top1_agreement")
    fields = {name: getattr(report, name) for name in numbers}
    return {"ran": True, "passed": report.passed, "gpu": gpu.name, "beside": beside, "verdict": report.verdict} | fields
