"""What the walk on the quantized prefix asks of a method: how a layer is fitted, a block tuned, a result read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_onebit.algorithms.blockwise import BlockOptions, BlockResult
from hf_onebit.algorithms.heldout_choices import STRENGTHS, target_correction
from hf_onebit.rungs.prefix import PrefixStatistics, QuantizedBlock


@dataclass
class Fitted:
    """One layer.

    Attributes:
        tensors: packed tensors by the names of docs/formats.md.
        dense: (out, in) float32, what they stand for.
        sizes: of the record: planes or bits, and bits per weight.
        choices: of the record: shrinkage and strength of the correction.
    """

    tensors: dict[str, Tensor]
    dense: Tensor
    sizes: dict[str, Any]
    choices: dict[str, Any]


@dataclass
class TunedLayers:
    """The layers of a block after tuning.

    Attributes:
        layers: {layer: (packed tensors, dense matrix)}.
        vectors: {parameter: new value}, by full names: gains and biases, in the model's dtype.
        result: how it went.
    """

    layers: dict[str, tuple[dict[str, Tensor], Tensor]]
    vectors: dict[str, Tensor]
    result: BlockResult


class LayerMethod(Protocol):
    """A method of quantizing, as ``quantize_on_prefix`` conducts it: block by block, in each stage by stage."""

    def begin_stage(self) -> None:
        """Layers that read other inputs come next."""

    def fit(self, name: str, W: Tensor, statistics: PrefixStatistics | None) -> Fitted:
        """Quantize one layer, W (out, in) float32."""

    def tune(self, view: QuantizedBlock, options: BlockOptions, dtype: torch.dtype) -> TunedLayers:
        """Tune the block whose layers were fitted last."""

    def dense(self, name: str, tensors: dict[str, Tensor], in_features: int) -> Tensor:
        """(out, in) float32, what packed tensors stand for."""

    def end_block(self) -> dict[str, Tensor]:
        """Forget the block; what later steps may need of it, by names that begin with the layer's."""


def sample_rows(W: Tensor, rows: int) -> Tensor:
    """About ``rows`` rows of W (out, in), evenly spaced."""
    return W[:: max(1, W.shape[0] // rows)][:rows]


@dataclass
class Corrections:
    """The target corrections of one stage: one for each input that its layers read.

    Of ``signs.STRENGTHS``, the one that suits held-out data is taken.
    """

    known: dict[int, Tensor] = field(default_factory=dict)

    def of(
        self,
        W: Tensor,
        sample: Tensor,
        statistics: PrefixStatistics,
        quantized: Callable[[Tensor], Tensor],
    ) -> tuple[float, Tensor]:
        """The strength that suits held-out data, and the target that comes of it (``signs.target_correction``).

        Args:
            W: (out, in) float32.
            sample: some rows of it, for the choice.
            statistics: of the layer's inputs.
            quantized: a quick fit to a target of any number of rows, each on its own, dequantized.
        """
        H, C = statistics.hessian, statistics.cross
        if H is None or C is None:
            return 0.0, W
        K = self.known.get(id(statistics))
        if K is None:
            K = self.known[id(statistics)] = target_correction(H, C)
        best = 0.5
        if statistics.heldout_hessian is not None and statistics.heldout_cross is not None:
            H_out, C_out = statistics.heldout_hessian.float(), statistics.heldout_cross.float()
            change, expected = sample @ K, sample @ C_out
            # Rows are quantized apart: one fit does for all strengths.
            found = quantized(torch.cat([sample + strength * change for strength in STRENGTHS]))
            losses = {
                strength: float(((Q @ H_out - 2 * expected) * Q).sum(dtype=torch.float64))
                for strength, Q in zip(STRENGTHS, found.split(len(sample)), strict=True)
            }
            best = min(losses, key=lambda strength: losses[strength])
        return best, W + best * (W @ K)
