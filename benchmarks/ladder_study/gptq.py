"""GPTQ with groups (Frantar et al. 2022, arXiv:2210.17323): columns one after the other, errors fed forward.

With H = Σ x xᵀ damped by a hundredth of its mean diagonal and U the upper Cholesky factor of H⁻¹ (H⁻¹ = Uᵀ U), column j
is rounded, and its error over U_jj, times row j of U, is taken from the columns after it. Scale and zero of a group are
searched when its first column comes, on the weights as they are by then. Columns keep their order.
"""

import torch
from torch import Tensor

from hf_onebit.algorithms.groupwise import quantize_groupwise

DAMPING = 0.01


def gptq(W: Tensor, H: Tensor, bits: int, group_size: int) -> Tensor:
    """The dequantized matrix.

    Args:
        W: (out, in) float.
        H: (in, in) float32, Σ x xᵀ of the inputs.
        bits: of one code.
        group_size: inputs that share a scale and a zero, each float16.

    Returns:
        (out, in) float32.
    """
    work, H = W.float().clone(), H.float().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    importance = H.diagonal()
    result = torch.empty_like(work)
    for start in range(0, W.shape[1], group_size):
        columns = slice(start, min(start + group_size, W.shape[1]))
        group, factor = work[:, columns], U[columns, columns]
        _, scales, zeros = quantize_groupwise(group, bits, group_size, False, importance[columns])
        assert zeros is not None
        s, z = scales[0].float(), zeros[0].float()
        safe = torch.where(s == 0, torch.ones_like(s), s)
        errors = torch.empty_like(group)
        for j in range(group.shape[1]):
            w = group[:, j]
            q = ((w + z) / safe).round().clamp_(0, 2**bits - 1)
            result[:, start + j] = q * s - z
            errors[:, j] = (w - result[:, start + j]) / factor[j, j]
            group[:, j:] -= errors[:, j : j + 1] * factor[j : j + 1, j:]
        work[:, columns.stop :] -= errors @ U[columns, columns.stop :]
    return result
