"""Rungs 2 and 3 of the quality ladder: signs under the full Hessian, on the inputs that the quantized prefix gives.

`quantize_on_prefix` conducts; the mathematics is in algorithms/signs.py, the walk in prefix.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms import signs
from hf_onebit.algorithms.closed_form import dequantize_planes
from hf_onebit.calibration import Batch
from hf_onebit.formats import onebit as fmt
from hf_onebit.nn.replace import float_weight
from hf_onebit.prefix import Depth, PrefixStatistics, walk_prefix

# Every so many sequences one is held out: the shrinkage and the strength of the correction are chosen on it.
HELDOUT_EVERY = 8
STRENGTHS = (0.0, 0.5, 1.0)
_SAMPLE_ROWS = 128


@dataclass
class PrefixResult:
    """What `quantize_on_prefix` found.

    Attributes:
        packed: {layer: packed tensors by the names of docs/formats.md}.
        records: {layer: sizes, errors, choices}.
        depths: the drift of the hidden states after each block.
    """

    packed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    depths: list[Depth] = field(default_factory=list)


@torch.no_grad()
def quantize_on_prefix(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    *,
    planes: int = 1,
    rounds: int = 4,
    arithmetic: torch.dtype | None = torch.bfloat16,
    done: Callable[[str, dict[str, Any]], None] = lambda name, record: None,
) -> PrefixResult:
    """Quantize the linear layers of a float model one stage after the other.

    The model's float weights are replaced by the dequantized ones on the way and are back when this returns or raises.

    Args:
        model: float model with one stack of blocks, whole in memory.
        layers: full names of the layers to quantize.
        batches: calibration sequences; every eighth is held out.
        planes: sign matrices per layer.
        rounds: see ``algorithms.signs.fit_signs``.
        arithmetic: dtype of the products inside of blocks, None for the model's own.
        done: called with each layer's name and record.

    Raises:
        ValueError: as ``walk_prefix`` and ``fit_signs``.
    """
    heldout = set(range(HELDOUT_EVERY - 1, len(batches), HELDOUT_EVERY))
    result = PrefixResult()
    originals: dict[str, Tensor] = {}

    def visit(stage: dict[str, PrefixStatistics | None]) -> None:
        choice = _Choice(stage, model, planes)
        for name, statistics in stage.items():
            start = time.perf_counter()
            module = model.get_submodule(name)
            W = float_weight(module).detach().float()
            fit, strength = choice.fit(name, W, statistics, rounds)
            result.packed[name] = _tensors(fit.planes)
            Q = dequantize_planes(fit.planes)
            result.records[name] = {
                "in_features": W.shape[1],
                "out_features": W.shape[0],
                "planes": planes,
                "bits_per_weight": fmt.bits_per_weight(W.shape[1], W.shape[0], planes),
                "relative_weight_error": _ratio((Q - W).square().sum(), W.square().sum()),
                "relative_output_error": _output_error(W, Q, statistics),
                "shrinkage": fit.shrinkage,
                "correction": strength,
                "seconds": time.perf_counter() - start,
            }
            originals[name] = module.weight.data
            module.weight.data = _as_stored(module, Q)
            done(name, result.records[name])

    try:
        result.depths = walk_prefix(model, layers, batches, visit, heldout=heldout, arithmetic=arithmetic)
    finally:
        for name, weight in originals.items():
            model.get_submodule(name).weight.data = weight
    return result


class _Choice:
    """What the layers of one stage share: a curvature and a correction for each input that they read."""

    def __init__(self, stage: dict[str, PrefixStatistics | None], model: nn.Module, planes: int) -> None:
        self.planes = planes
        self._curvatures: dict[int, signs.Curvature] = {}
        self._corrections: dict[int, Tensor] = {}

    def fit(
        self, name: str, W: Tensor, statistics: PrefixStatistics | None, rounds: int
    ) -> tuple[signs.SignFit, float]:
        """Signs and scales of one layer, and the strength of its correction."""
        if statistics is None or statistics.hessian is None:  # an expert that no token chose
            blank = signs.Curvature(torch.zeros(W.shape[1], W.shape[1]))
            return signs.fit_signs(W, blank, planes=self.planes, rounds=rounds, layer=name), 0.0
        curvature = self._curvature(name, W, statistics)
        strength, target = self._target(name, W, statistics, curvature)
        return signs.fit_signs(target, curvature, planes=self.planes, rounds=rounds, layer=name), strength

    def _curvature(self, name: str, W: Tensor, statistics: PrefixStatistics) -> signs.Curvature:
        key = id(statistics)
        if key not in self._curvatures:
            assert statistics.hessian is not None
            if statistics.heldout_hessian is None:
                self._curvatures[key] = signs.Curvature(statistics.hessian, 0.15)
            else:
                self._curvatures[key], _ = signs.choose_shrinkage(
                    W, statistics.hessian, statistics.heldout_hessian, planes=self.planes, layer=name
                )
        return self._curvatures[key]

    def _target(
        self, name: str, W: Tensor, statistics: PrefixStatistics, curvature: signs.Curvature
    ) -> tuple[float, Tensor]:
        H, C = statistics.hessian, statistics.cross
        if H is None or C is None:
            return 0.0, W
        key = id(statistics)
        if key not in self._corrections:
            self._corrections[key] = signs.target_correction(H, C)
        K = self._corrections[key]
        best = 0.5
        if statistics.heldout_hessian is not None and statistics.heldout_cross is not None:
            sample = signs.sample_rows(W, _SAMPLE_ROWS)
            losses = {}
            for strength in STRENGTHS:
                fit = signs.fit_signs(
                    sample + strength * (sample @ K), curvature, planes=self.planes, rounds=1, layer=name
                )
                losses[strength] = signs.drift_loss(
                    sample, fit.planes, statistics.heldout_hessian, statistics.heldout_cross
                )
            best = min(losses, key=lambda strength: losses[strength])
        return best, W + best * (W @ K)


def _as_stored(module: nn.Module, oriented: Tensor) -> Tensor:
    """(out, in) in the module's own dtype and orientation."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    own = oriented.t() if type(module).__name__ == "Conv1D" else oriented
    return own.to(weight.dtype).contiguous()


def _tensors(planes: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, (plane_signs, a, b) in enumerate(planes):
        tensors |= dict(zip(fmt.plane_names(index), (fmt.pack_signs(plane_signs), a, b), strict=True))
    return tensors


def _output_error(W: Tensor, Q: Tensor, statistics: PrefixStatistics | None) -> float | None:
    if statistics is None or statistics.hessian is None:
        return None
    H = statistics.hessian
    R = Q - W
    return _ratio(((R @ H) * R).sum(dtype=torch.float64), ((W @ H) * W).sum(dtype=torch.float64))


def _ratio(error: Tensor, size: Tensor) -> float | None:
    return float(error) / float(size) if float(size) > 0 else None
