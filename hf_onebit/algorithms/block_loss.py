"""How far a quantized block is from its float block: a mean square in which no channel and no token decides alone.

    L = Σ_t w_t Σ_j c_j (y_tj − ŷ_tj)² / Σ_t w_t Σ_j c_j (y_tj − x_tj)²

x, y are the float block's hidden states before and behind it, x̂, ŷ the quantized block's. L = 1 is the error of a block
that does nothing. Channels count by the inverse of what the block writes to them, tokens by that of the error that they
bring along,

    c_j = 1 / (d_j + 0.1 mean d),   d_j = E_t (y_tj − x_tj)²
    w_t = min(1, 4 median / q_t),    q_t = Σ_j c_j (x̂_tj − x_tj)²

Models put massive values into a few channels of a few tokens, mostly the first one (Sun et al. 2024, arXiv:2402.17762).
The block that writes them has to, so what is written never lowers a token's weight; but what it missed no later block
can mend, and in a plain mean square that would outweigh everything that they can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A token counts in full up to so many times the median's size.
_CAP = 4.0


@dataclass(frozen=True)
class Example:
    """One sequence for one block.

    Attributes:
        forward: () -> (rows, hidden), the quantized block's output as it is now; differentiable.
        target: (rows, hidden), the float block's output.
        float_input: (rows, hidden), the float block's input.
        input: (rows, hidden), the quantized block's input; None where it is the float one's.
    """

    forward: Callable[[], Tensor]
    target: Tensor
    float_input: Tensor
    input: Tensor | None = None

    def written(self) -> Tensor:
        """(y − x)² (rows, hidden) float32."""
        return (self.target.float() - self.float_input.float()).square_()

    def inherited(self) -> Tensor | None:
        """(x̂ − x)² (rows, hidden) float32, or None where there is no difference."""
        return None if self.input is None else (self.input.float() - self.float_input.float()).square_()


@dataclass(frozen=True)
class BlockLoss:
    """The weights of L.

    Attributes:
        channel: c (hidden,).
        median: of q over the tokens that the weights were taken from; 0 where nothing is inherited.
    """

    channel: Tensor
    median: float

    @classmethod
    @torch.no_grad()
    def of(cls, examples: Sequence[Example]) -> BlockLoss:
        """Weights for these examples."""
        d = sum((example.written().sum(0) for example in examples), torch.zeros_like(examples[0].target[0].float()))
        d = d / sum(len(example.target) for example in examples)
        channel = 1 / (d + 0.1 * d.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        sizes = [found @ channel for example in examples if (found := example.inherited()) is not None]
        return cls(channel, _middle(torch.cat(sizes)) if sizes else 0.0)

    @torch.no_grad()
    def rows(self, example: Example) -> Tensor:
        """w (rows,) of an example."""
        inherited = example.inherited()
        if inherited is None:
            return torch.ones(len(example.target), device=example.target.device)
        sizes, limit = inherited @ self.channel, _CAP * self.median
        return torch.where(sizes > limit, limit / sizes, 1.0)

    @torch.no_grad()
    def unit(self, examples: Sequence[Example]) -> float:
        """The denominator of L over some examples; 1 where a block writes nothing."""
        return sum(float(self.rows(example) @ (example.written() @ self.channel)) for example in examples) or 1.0

    def error(self, example: Example, rows: Tensor) -> Tensor:
        """The numerator of L for one example, whose ``rows`` are its weights; differentiable."""
        output = example.forward().float()
        difference = output - example.target.to(output.device, torch.float32)  # what was spilled is on the CPU
        return rows.to(output.device) @ (difference.square() @ self.channel.to(output.device))


def _middle(sizes: Tensor) -> float:
    """The median; the mean where more than half of the tokens have none."""
    return float(sizes.median()) or float(sizes.mean())
