"""Fit a linear profile to the iterations that a capture recorded, by non-negative least squares.

Needs scipy besides servecal. ``profiles/fitted/vllm-cpu-llama-8x512.yaml`` was made by it from one capture, so
that another (``vllm-cpu-shared-prefix``) took no part in it::

    python fit_linear_profile.py vllm-cpu-shared-prefix-2 vllm-cpu-llama-8x512.yaml

An iteration is taken to last until the next one starts, where that follows at once: the host's work between
two steps is part of what a request waits for. Squares are weighted by 1 / duration, as the noise of a shared
machine grows with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from calibrate.reconstruction import spans_of_recording
from profiles.profile import Accelerator, Host, Profile
from replay.readers import read_trace
from replay.trace import Trace
from simulator.accelerators.linear import Linear


def observations(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Return features, shape (iterations, features), and seconds of a trace's iterations."""
    spans = spans_of_recording(trace)
    return np.array([Linear.features(batch) for [batch], _ in spans]), np.array([seconds for _, seconds in spans])


def main(folder: str, output: str) -> None:
    """Fit and write the profile."""
    trace = read_trace(Path(folder))
    features, seconds = observations(trace)
    weight = seconds**-0.5
    fitted, _ = nnls(features * weight[:, None], seconds * weight)
    residual = features @ fitted / seconds - 1
    coefficients = {name: float(f"{one:.6g}") for name, one in zip(Linear.components, fitted, strict=True)}
    profile = Profile(
        name=Path(output).stem,
        description=f"Linear in the batch; fitted to the recorded iterations of {trace.name} (vLLM on a CPU).",
        accelerator=Accelerator.model_validate({"kind": "linear", "seconds": coefficients}),
        host=Host(per_step=0.0, per_sequence=0.0, source="part of the recorded iterations"),
        provenance={
            "method": "non-negative least squares on iterations (fit_linear_profile.py)",
            "trace": trace.name,
            "trace_digest": trace.digest(),
            "iterations": len(seconds),
            "iteration_mape": float(f"{np.abs(residual).mean():.4f}"),
        },
    )
    Path(output).write_text(profile.to_yaml(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
