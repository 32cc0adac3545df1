"""KL divergence between two models' next-token distributions, and its gradient, in chunks of rows.

For one row with logits t (teacher) and s (student), p = softmax(t/τ), q = softmax(s/τ):

    KL(p ‖ q) = Σ_v p_v (t_v − s_v)/τ + logsumexp(s/τ) − logsumexp(t/τ),     ∂(τ² KL)/∂s = τ (q − p)

(Hinton, Vinyals and Dean 2015, arXiv:1503.02531, §2). The gradient is known in the forward pass, so it is taken there
and nothing of the vocabulary's size outlives a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HEAD_ROWS = 512  # rows of one product with the head: fewer and the product is bound by reading the head
# Floats of one buffer of the softmax: on a CPU it stays near the core, elsewhere fewer and larger kernels are faster.
_ELEMENTWISE_FLOATS = 1 << 21
_ELEMENTWISE_FLOATS_ELSEWHERE = 1 << 25


def kl_from_logits(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) of each row, and the gradient of its sum.

    Args:
        teacher: (rows, vocabulary) logits, any float dtype.
        student: the same shape.
        temperature: τ > 0; both distributions are softened by it and the result is multiplied by τ².

    Returns:
        float32 (rows,), and the gradient with respect to ``student``, in its dtype and shape.
    """
    gradient = torch.empty_like(student)
    return _kl_rows(teacher, student, temperature, gradient), gradient


def kl_from_features(
    teacher: Tensor,
    student: Tensor,
    teacher_head: Tensor | None = None,
    student_head: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Mean KL(teacher ‖ student) over rows, differentiable in ``student`` alone; bounded memory.

    Args:
        teacher: (rows, d) features in front of the head; or (rows, vocabulary) logits where its head is None.
        student: likewise, (rows, d').
        teacher_head: (vocabulary, d), the weight of a linear head without bias; or None.
        student_head: likewise (vocabulary, d'), frozen.
        temperature: τ > 0.

    Returns:
        A float32 scalar. Beside the inputs this holds two times ``HEAD_ROWS`` rows of logits.

    Raises:
        ValueError: shapes that do not belong together, no rows, or a temperature that is not positive.
    """
    check_kl(teacher, student, teacher_head, student_head, temperature)
    total: Tensor = _FeatureKL.apply(teacher.detach(), student, teacher_head, student_head, temperature)
    return total


def check_kl(
    teacher: Tensor, student: Tensor, teacher_head: Tensor | None, student_head: Tensor | None, temperature: float
) -> None:
    """Refuse what :func:`kl_from_features` cannot compare.

    Raises:
        ValueError: as there.
    """
    if teacher.dim() != 2 or student.dim() != 2 or teacher.shape[0] != student.shape[0] or not teacher.shape[0]:
        raise ValueError(
            f"kl_from_features: expected two matrices of the same rows (at least 1), got {tuple(teacher.shape)} and "
            f"{tuple(student.shape)}; flatten (batch, length) to rows first"
        )
    widths = []
    for name, features, head in (("teacher", teacher, teacher_head), ("student", student, student_head)):
        if head is not None and (head.dim() != 2 or head.shape[1] != features.shape[1]):
            raise ValueError(
                f"kl_from_features: {name}_head has shape {tuple(head.shape)}, expected (vocabulary, "
                f"{features.shape[1]}) for features of shape {tuple(features.shape)}"
            )
        widths.append(features.shape[1] if head is None else head.shape[0])
    if widths[0] != widths[1]:
        raise ValueError(
            f"kl_from_features: the teacher has a vocabulary of {widths[0]}, the student of {widths[1]}; both models "
            "must share one tokenizer"
        )
    if not temperature > 0:
        raise ValueError(f"kl_from_features: temperature must be positive, got {temperature}")


class _FeatureKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher: Tensor,
        student: Tensor,
        teacher_head: Tensor | None,
        student_head: Tensor | None,
        temperature: float,
    ) -> Tensor:
        rows = student.shape[0]
        wants = ctx.needs_input_grad[1]
        gradient = torch.empty_like(student) if wants else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        logits: list[Tensor | None] = [None, None]
        for start in range(0, rows, HEAD_ROWS):
            part = slice(start, min(start + HEAD_ROWS, rows))
            both = []
            for i, (features, head) in enumerate(((teacher, teacher_head), (student, student_head))):
                if head is None:
                    both.append(features[part].detach())
                    continue
                buffer = logits[i]
                if buffer is None or len(buffer) != part.stop - start:  # one buffer for all whole chunks
                    buffer = logits[i] = features.new_empty(part.stop - start, head.shape[0])
                torch.mm(features[part], head.to(features.dtype).t(), out=buffer)
                both.append(buffer)
            into = None
            if gradient is not None:
                # Logits that were made here are overwritten by their gradient.
                into = gradient[part] if student_head is None else both[1]
            total += _kl_rows(both[0], both[1], temperature, into).sum(dtype=torch.float64)
            if gradient is not None and student_head is not None:
                torch.mm(both[1], student_head.to(student.dtype), out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.rows = rows
        return (total / rows).float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            return None, None, None, None, None
        (gradient,) = ctx.saved_tensors
        return None, gradient * (upstream / ctx.rows).to(gradient.dtype), None, None, None


def _kl_rows(teacher: Tensor, student: Tensor, temperature: float, gradient: Tensor | None) -> Tensor:
    """float32 (rows,); writes the gradient of the sum into ``gradient``, which may be ``student`` itself."""
    rows, vocabulary = student.shape
    floats = _ELEMENTWISE_FLOATS if student.device.type == "cpu" else _ELEMENTWISE_FLOATS_ELSEWHERE
    step = max(1, floats // max(vocabulary, 1))
    kl = torch.empty(rows, dtype=torch.float32, device=student.device)
    q, p, difference = (student.new_empty(min(step, rows), vocabulary, dtype=torch.float32) for _ in range(3))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        count = part.stop - start
        Q, P, D = q[:count], p[:count], difference[:count]
        Q.copy_(student[part]).div_(temperature)
        P.copy_(teacher[part]).div_(temperature)
        torch.sub(P, Q, out=D)
        peaks, sums = [], []
        for X in (Q, P):
            peak = X.amax(-1, keepdim=True)
            X.sub_(peak).exp_()
            peaks.append(peak)
            sums.append(X.sum(-1, keepdim=True))
        P.div_(sums[1])
        kl[part] = temperature**2 * (
            D.mul_(P).sum(-1) + ((peaks[0] + sums[0].log()) - (peaks[1] + sums[1].log())).squeeze(-1)
        )
        if gradient is not None:
            gradient[part] = Q.div_(sums[0]).sub_(P).mul_(temperature)
    return kl
