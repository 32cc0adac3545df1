"""How far a quantized block is from its float block: a mean square in which no channel and no token decides alone.

    L = Σ_t w_t Σ_j c_j (y_tj − ŷ_tj)² / Σ_t w_t Σ_j c_j (y_tj − x_tj)²

x, y are the float block's hidden states before and behind it, x̂, ŷ the quantized block's. L = 1 is the error of a block
that does nothing. Both weights go by what a block has to write and what error it inherits,

    s_tj = (y_tj − x_tj)² + (x̂_tj − x_tj)²,   c_j = 1 / (d_j + 0.1 mean d),   d_j = Σ_t w_t s_tj / Σ_t w_t,

and w_t = min(1, 4 median / q_t) with q_t = Σ_j c_j s_tj. Models put massive values into a few channels of a few tokens,
mostly the first one (Sun et al. 2024, arXiv:2402.17762): once the quantized stream has missed those, no later block can
mend them, and in a plain mean square they would outweigh everything that it can.
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

    def sizes(self) -> Tensor:
        """s (rows, hidden) float32."""
        x = self.float_input.float()
        written = (self.target.float() - x).square_()
        return written if self.input is None else written.add_((self.input.float() - x).square_())


@dataclass(frozen=True)
class BlockLoss:
    """The weights of L.

    Attributes:
        channel: c (hidden,).
        median: of q over the tokens that the weights were taken from.
    """

    channel: Tensor
    median: float

    @classmethod
    @torch.no_grad()
    def of(cls, examples: Sequence[Example]) -> BlockLoss:
        """Weights for these examples; their first guess, that all channels count alike, is mended once."""
        loss = cls(torch.ones_like(examples[0].target[0], dtype=torch.float32), 0.0)
        for _ in range(2):
            sizes = torch.cat([example.sizes() @ loss.channel for example in examples])
            loss = cls(loss.channel, _middle(sizes))
            total = torch.zeros_like(loss.channel)
            weight = 0.0
            for example in examples:
                w = loss.rows(example)
                total += w @ example.sizes()
                weight += float(w.sum())
            d = total / weight
            loss = cls(1 / (d + 0.1 * d.mean()).clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        return cls(loss.channel, _middle(torch.cat([example.sizes() @ loss.channel for example in examples])))

    @torch.no_grad()
    def rows(self, example: Example) -> Tensor:
        """w (rows,) of an example."""
        sizes = example.sizes() @ self.channel
        limit = _CAP * self.median
        return torch.where(sizes > limit, limit / sizes, 1.0)

    @torch.no_grad()
    def unit(self, examples: Sequence[Example]) -> float:
        """The denominator of L over some examples; 1 where a block writes nothing."""
        total = 0.0
        for example in examples:
            written = (example.target.float() - example.float_input.float()).square()
            total += float(self.rows(example) @ (written @ self.channel))
        return total or 1.0

    def error(self, example: Example, rows: Tensor) -> Tensor:
        """The numerator of L for one example, whose ``rows`` are its weights; differentiable."""
        output = example.forward().float()
        difference = output - example.target.to(output.device, torch.float32)  # what was spilled is on the CPU
        return rows.to(output.device) @ (difference.square() @ self.channel.to(output.device))


def _middle(sizes: Tensor) -> float:
    """The median; the mean where more than half of the tokens have none."""
    return float(sizes.median()) or float(sizes.mean())
