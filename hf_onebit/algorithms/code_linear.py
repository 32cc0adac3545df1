"""The training form of a group-quantized layer: codes as bytes, scales and zeros that learn, and codes that follow.

The matrix W = s q − z is folded once a step and used like any other matrix. With the gradient g_W of the loss by W,
which backward forms once,

    ∂L/∂s_g = Σ_{j in g} g_W[j] q_j,     ∂L/∂z_g = −Σ_{j in g} g_W[j],     ∂L/∂u_j = g_W[j] s_g

u is the latent of a code, q = round(u): the gradient passes straight through the rounding (Bengio et al. 2013,
arXiv:1308.3432). All three learned together is the block-wise step of Chen et al. 2024 (arXiv:2407.11062).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_onebit.algorithms.gptq import GroupFit

__all__ = ["CodeLatents", "CodeLinear"]

# Latents start at most this far from their codes, so that the first step changes none.
_MOST_MARGIN = 0.49
# Below any gradient that tells something: a share of the loss's mean over millions of weights is small.
_EPSILON = 1e-15


class CodeLinear(nn.Module):
    """y = W x + bias with W = s q − z, the form in which a group-quantized layer trains.

    Args:
        fit: codes, scales, zeros and groups.
        bits: width of one code.
        group_size: inputs that share a scale, or -1 for all; not looked at where the fit has a ``g_idx``.
        bias: (out,) or None; copied.
        dtype: of the products. The layer takes 1 byte a weight for the codes and this dtype's size for W.

    Attributes:
        scales, zeros: (groups, out) float32 parameters; ``zeros`` is None in a symmetric layer.
        codes: (out, in) uint8.
        latent: (out, in) float32 whose gradient backward fills (`CodeLatents`), or None.
    """

    bias: nn.Parameter | None
    zeros: nn.Parameter | None

    def __init__(
        self,
        fit: GroupFit,
        bits: int,
        group_size: int,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        n = fit.codes.shape[1]
        self.codes = fit.codes.clone()
        self.top = (1 << bits) - 1
        self.middle = 0.5 if bits == 1 else float(1 << (bits - 1))
        self.size = n if group_size == -1 else min(group_size, n)
        self.g_idx = None if fit.g_idx is None else fit.g_idx.long()
        self.scales = nn.Parameter(fit.scales.float().clone())
        self.register_parameter("zeros", None if fit.zeros is None else nn.Parameter(fit.zeros.float().clone()))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().float().clone()))
        self.folded = torch.empty(fit.codes.shape, dtype=dtype, device=fit.codes.device)
        self.latent: Tensor | None = None
        self.fold()

    def spread(self, statistics: Tensor) -> Tensor:
        """(groups, out) -> (out, in)."""
        columns = statistics.T
        if self.g_idx is not None:
            return columns[:, self.g_idx]
        return columns.repeat_interleave(self.size, 1)[:, : self.codes.shape[1]]

    def gather(self, values: Tensor) -> Tensor:
        """(out, in), summed over each group -> (groups, out)."""
        rows, n = values.shape
        if self.g_idx is not None:
            return values.new_zeros(rows, len(self.scales)).index_add_(1, self.g_idx, values).T
        missing = len(self.scales) * self.size - n
        return F.pad(values, (0, missing)).view(rows, len(self.scales), self.size).sum(-1).T

    @torch.no_grad()
    def dense(self) -> Tensor:
        """W as float32, from codes, scales and zeros as they are now."""
        if self.zeros is None:
            return (self.codes.float() - self.middle).mul_(self.spread(self.scales))
        return self.codes.float().mul_(self.spread(self.scales)).sub_(self.spread(self.zeros))

    @torch.no_grad()
    def fold(self) -> None:
        """Make W; whoever changes codes, scales or zeros calls this."""
        self.folded.copy_(self.dense())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        y: Tensor = _CodedProduct.apply(x.to(self.folded.dtype), self.scales, self.zeros, self)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)


class _CodedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, zeros: Tensor | None, layer: CodeLinear) -> Tensor:
        ctx.layer = layer
        # W is written in place at the next fold: what backward needs of it is used before that.
        ctx.save_for_backward(x)
        return F.linear(x, layer.folded)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer: CodeLinear = ctx.layer
        gx = gy @ layer.folded if ctx.needs_input_grad[0] else None
        gs = gz = None
        if ctx.needs_input_grad[1] or layer.latent is not None:
            gW = (gy.reshape(-1, gy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).float()
            if layer.zeros is None:
                gs = layer.gather(gW * (layer.codes.float() - layer.middle))
            else:
                gs, gz = layer.gather(gW * layer.codes), layer.gather(gW).neg_()
            if layer.latent is not None:
                through = gW.mul_(layer.spread(layer.scales.detach()))
                layer.latent.grad = through if layer.latent.grad is None else layer.latent.grad.add_(through)
        return gx, gs, gz, None


class CodeLatents:
    """Codes that learn: the latents of some layers, and their optimizer (`blockwise.Discrete`).

    Args:
        layers: in training form.
        latents: {layer: (out, in) float, where the code would like to be}; the codes of a layer that is missing here
            stay as they are. Each starts nearer to its code than to another.
        betas: Adam's.
    """

    def __init__(
        self,
        layers: Mapping[str, CodeLinear],
        latents: Mapping[str, Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self.layers = dict(layers)
        self.latents: dict[str, Tensor] = {}
        for name, wish in (latents or {}).items():
            codes = self.layers[name].codes.float()
            start = (wish.detach().float() - codes).nan_to_num_(0).clamp_(-_MOST_MARGIN, _MOST_MARGIN).add_(codes)
            self.latents[name] = self.layers[name].latent = start
        values = list(self.latents.values())
        # Adam's steps do not depend on the gradients' scale; the rate is given anew at each.
        self._adam = torch.optim.Adam(values, lr=0.0, betas=betas, eps=_EPSILON, fused=True) if values else None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the latents against the gradients that backward left, and drop those; ``rate`` is the largest step, in
        codes."""
        if self._adam is None:
            return
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        for name, latent in self.latents.items():
            latent.grad = None
            # A latent further out than that would take steps to come back.
            latent.clamp_(-_MOST_MARGIN, self.layers[name].top + _MOST_MARGIN)

    @torch.no_grad()
    def publish(self) -> None:
        """Give the layers the codes of their latents, and fold all layers."""
        for name, latent in self.latents.items():
            layer = self.layers[name]
            layer.codes.copy_(latent.round().clamp_(0, layer.top))
        for layer in self.layers.values():
            layer.fold()

    def fold(self) -> None:
        """The same: layers fold codes, not latents."""
        self.publish()

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the codes."""
        return {name: layer.codes.clone() for name, layer in self.layers.items()}

    @torch.no_grad()
    def restore(self, codes: Mapping[str, Tensor]) -> None:
        """Take these codes for good: latents no longer count."""
        for name, layer in self.layers.items():
            layer.latent = None
            layer.codes.copy_(codes[name])
            layer.fold()
        self.latents.clear()
        self._adam = None

    def changed(self, first: Mapping[str, Tensor]) -> float:
        """Share of the codes that differ from these."""
        different = sum(int((layer.codes != first[name]).sum()) for name, layer in self.layers.items())
        return different / max(1, sum(codes.numel() for codes in first.values()))
