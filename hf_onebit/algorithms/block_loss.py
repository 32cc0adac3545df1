"""How far a quantized block is from its float block: a mean square in which no channel decides alone.

    L = Σ_t Σ_j c_j (y_tj − ŷ_tj)² / Σ_t Σ_j c_j (y_tj − x_tj)²,   c_j = 1 / (d_j + 0.1 mean d),   d_j = E (y_j − x_j)²

Each channel counts by the inverse of what the block writes to it, so that a few channels of massive size do not decide
alone; x, y are the float block's hidden states before and behind it, ŷ the quantized block's. L = 1 is the error of a
block that does nothing. Tokens all count alike: what came of weighing them is in docs/methods/blockwise.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One sequence for one block.

    Attributes:
        forward: () -> (rows, hidden), the quantized block's output as it is now; differentiable.
        target: (rows, hidden), the float block's output.
        float_input: (rows, hidden), the float block's input.
    """

    forward: Callable[[], Tensor]
    target: Tensor
    float_input: Tensor

    def written(self) -> Tensor:
        """(y − x)² (rows, hidden) float32."""
        return (self.target.float() - self.float_input.float()).square_()


@dataclass(frozen=True)
class BlockLoss:
    """The weights of L.

    Attributes:
        channel: c (hidden,).
    """

    channel: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, examples: Sequence[Example]) -> BlockLoss:
        """Weights for these examples."""
        total = sum((e.written().sum(0) for e in examples), torch.zeros_like(examples[0].target[0].float()))
        d = total / sum(len(e.target) for e in examples)
        return cls(1 / (d + 0.1 * d.mean()).clamp_min(torch.finfo(torch.float32).tiny))

    @torch.no_grad()
    def unit(self, examples: Sequence[Example]) -> float:
        """The denominator of L over some examples; 1 where a block writes nothing."""
        return sum(float((e.written().sum(0) * self.channel).sum()) for e in examples) or 1.0

    def error(self, example: Example) -> Tensor:
        """The numerator of L for one example; differentiable."""
        output = example.forward().float()
        difference = output - example.target.to(output.device, torch.float32)  # what was spilled is on the CPU
        return (difference.square().sum(0) * self.channel.to(output.device)).sum()
