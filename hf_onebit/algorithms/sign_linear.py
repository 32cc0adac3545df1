"""The training form of a one-bit layer: frozen dense signs, scales that learn.

The matrix W = diag(a) S diag(b) is folded once a step and used like any other matrix, so a step multiplies no
activation by a scale. The scales' gradients need no gradient of W. With y = W x and g_y, g_x the gradients of the loss
by y and by this layer's x, each taken at token t,

    ∂L/∂a_i = (1/a_i) Σ_t g_y[t,i] y[t,i],        ∂L/∂b_j = (1/b_j) Σ_t g_x[t,j] x[t,j],

since y_i is linear in a_i, and the loss sees b_j only through b_j x_j. Backward costs the one product that g_x needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class SignGradient:
    """What flips are chosen by: sums over the tokens seen since the last reset.

    Attributes:
        weight: float32 (out, in), the gradient of the loss by W.
        outputs: float32 (out,), Σ_t g_y²; inputs: float32 (in,), Σ_t x²; rows: how many t.
    """

    weight: Tensor
    outputs: Tensor
    inputs: Tensor
    rows: int = 0


class SignPlane(nn.Module):
    """One plane: y = diag(a) S diag(b) x.

    Where it has a ``latent`` (`latents.SignLatents`), W takes the latent's signs, and backward adds ∂L/∂W ⊙ a bᵀ
    to ``latent.grad``; ``signs`` are behind until the latents are published. A latent that ``stands_for_two`` planes
    (`pair_latents.PairLatents`) has the gradient alike, and W the ``signs``.

    Args:
        signs: (out, in), values above zero mean +1, all others −1.
        a: (out,) and b: (in,), any float dtype; trained in float32. An entry that is exactly zero stays zero.
        dtype: of the products. The plane takes 1 byte a weight for the signs and this dtype's size for W.

    Raises:
        ValueError: shapes that do not belong together.
    """

    def __init__(self, signs: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if signs.shape != (len(a), len(b)):
            raise ValueError(
                f"SignPlane: signs have shape {tuple(signs.shape)}, expected (out, in) = ({len(a)}, {len(b)})"
            )
        self.signs = torch.where(signs > 0, 1, -1).to(torch.int8).contiguous()
        self.a = nn.Parameter(a.detach().float().clone())
        self.b = nn.Parameter(b.detach().float().clone())
        self.folded = torch.empty(signs.shape, dtype=dtype, device=signs.device)
        self.sign_gradient: SignGradient | None = None
        self.latent: Tensor | None = None
        self.stands_for_two = False
        self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Make W from the signs and scales as they are now; whoever changes any of them calls this."""
        if self.latent is None or self.stands_for_two:
            self.folded.copy_(torch.outer(self.a, self.b)).mul_(self.signs)
        else:  # once a step: few passes over the matrix
            signs = torch.copysign(self.a.new_ones(()), self.latent)
            self.folded.copy_(signs.mul_(self.a[:, None]).mul_(self.b))

    def collect_sign_gradient(self, enabled: bool = True) -> None:
        """Start, at zero, to sum what flips are chosen by, or stop and free it (4 bytes a weight)."""
        self.sign_gradient = None
        if enabled:
            weight = torch.zeros(self.signs.shape, device=self.signs.device)
            self.sign_gradient = SignGradient(weight, torch.zeros_like(self.a), torch.zeros_like(self.b))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the products."""
        y: Tensor = _FoldedProduct.apply(x.to(self.folded.dtype), self.a, self.b, self.folded, self)
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> SignPlane:
        # Scales stay float32 and products in their dtype: only the device may change.
        device = fn(torch.empty(0, device=self.a.device)).device
        for scale in (self.a, self.b):
            scale.data = scale.data.to(device)
        self.signs, self.folded = self.signs.to(device), self.folded.to(device)
        return self


class SignLinear(nn.Module):
    """A layer in training form: the sum of its planes, and the bias.

    Args:
        planes: (signs, a, b) of each plane, as for ``SignPlane``.
        bias: (out,) or None; copied.
        dtype: of the products.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        planes: Sequence[tuple[Tensor, Tensor, Tensor]],
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.planes = nn.ModuleList(SignPlane(*plane, dtype=dtype) for plane in planes)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().float().clone()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        total: Tensor | None = None
        for plane in self.planes:
            y = plane(x)
            total = y if total is None else total + y
        if total is None:
            raise ValueError("SignLinear: expected at least one plane, got none")
        if self.bias is not None:
            total = total + self.bias.to(total.dtype)
        return total.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> SignLinear:
        for plane in self.planes:
            plane._apply(fn)
        if self.bias is not None:
            self.bias.data = self.bias.data.to(fn(torch.empty(0, device=self.bias.device)).device)
        return self


def sign_planes(model: nn.Module) -> dict[str, SignPlane]:
    """Every plane in training form, by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SignPlane)}


class _FoldedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, W: Tensor, plane: SignPlane) -> Tensor:
        y = F.linear(x, W)
        _, needs_a, needs_b = ctx.needs_input_grad[:3]
        ctx.plane = plane
        collects = plane.sign_gradient is not None or plane.latent is not None
        ctx.save_for_backward(x if needs_b or collects else None, y if needs_a else None, a, b, W)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, a, b, W = ctx.saved_tensors
        needs_x, _, needs_b = ctx.needs_input_grad[:3]
        gx = gy @ W if needs_x or needs_b else None
        ga = None if y is None else _column_dot(gy, y) / _nonzero(a)
        gb = _column_dot(gx, x) / _nonzero(b) if needs_b and gx is not None else None
        plane: SignPlane = ctx.plane
        gradient = plane.sign_gradient
        if x is not None and (gradient is not None or plane.latent is not None):
            rows, columns = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
            if plane.latent is not None:
                # The scales join the factors, which are smaller than the product.
                product = (rows * a.to(rows.dtype)).t() @ (columns * b.to(columns.dtype))
                grad = plane.latent.grad
                plane.latent.grad = product.float() if grad is None else grad.add_(product)
            if gradient is not None:
                gradient.weight += rows.t() @ columns
                gradient.outputs += rows.float().square().sum(0)
                gradient.inputs += columns.float().square().sum(0)
                gradient.rows += len(rows)
        return gx if needs_x else None, ga, gb, None, None


def _column_dot(u: Tensor, v: Tensor) -> Tensor:
    """Σ_t u[t,:] v[t,:] in float32. The sum is a product with a row of ones: faster than a sum over a strided axis."""
    products = (u * v).reshape(-1, u.shape[-1])
    ones = products.new_ones(1, len(products))
    return (ones @ products)[0].float()


def _nonzero(scales: Tensor) -> Tensor:
    # Where a scale is zero its sum is zero too: any divisor gives the gradient zero.
    return torch.where(scales == 0, torch.ones_like(scales), scales)
