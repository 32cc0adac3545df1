"""The operators of signs on GPUs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_onebit.ops import gpu, gpu_products, reference, schema


def onebit_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    weight_1: Tensor | None = None,
    a_1: Tensor | None = None,
    b_1: Tensor | None = None,
) -> Tensor:
    """Kernel of ``hf_onebit::onebit_linear``."""

    def usable() -> bool:
        schema.check_onebit_linear(x, weight, a, b, bias, weight_1, a_1, b_1)
        return gpu.takes(x, weight) and gpu.agrees(x, "onebit", dtype=x.dtype, planes=1 if weight_1 is None else 2)

    def operand() -> Any:
        return gpu.launch().onebit_operand(weight, a, b, weight_1, a_1, b_1)

    signature = gpu_products.signature(0, 0, x, weight, a, b, bias, weight_1, a_1, b_1)
    plan = gpu_products.plan(signature, x, usable, operand)
    if plan is None:
        return reference.onebit_linear(x, weight, a, b, bias, weight_1, a_1, b_1)
    with gpu.on(x):
        return gpu_products.linear(x, operand(), bias, plan)


def onebit_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    weight_1: Tensor | None,
    a_1: Tensor | None,
    b_1: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Kernel of ``hf_onebit::onebit_linear_backward``: expansion by Triton, products by torch, sums in float32.

    Both products have a float operand as large as the batch, so they are left to tensor cores' own library. The scale
    that a sum runs over is folded into the expanded signs, the other one is applied to the float32 sums.
    """
    schema.check_onebit_linear_backward(grad, x, weight, a, b, weight_1, a_1, b_1, needs)
    if (
        not gpu.takes(grad, weight)
        or not b.numel()
        or not gpu.agrees(x, "onebit", dtype=x.dtype, planes=1 if weight_1 is None else 2)
    ):
        return reference.onebit_linear_backward(grad, x, weight, a, b, weight_1, a_1, b_1, needs)
    need_x, need_a, need_b, need_a_1, need_b_1 = needs
    with gpu.on(x):
        g, K = reference.as_rows(grad), b.shape[0]
        grad_x = x.new_empty(0)
        grads = [x.new_empty(0) for _ in range(4)]
        if need_x and not (need_b or need_b_1):  # both scales and both planes in one matrix
            operand = gpu.launch().onebit_operand(weight, a, b, weight_1, a_1, b_1)
            grad_x = (g @ gpu.launch().expanded(operand, K, x.dtype).T).reshape(x.shape)
            need_x = False
        sum_x: Tensor | None = None
        each = ((weight, a, b, need_a, need_b), (weight_1, a_1, b_1, need_a_1, need_b_1))
        for plane, (w, a_p, b_p, need_a_p, need_b_p) in enumerate(each):
            if w is None or a_p is None or b_p is None or not (need_x or need_a_p or need_b_p):
                continue
            operand = gpu.launch().onebit_operand(w, a_p, b_p, None, None, None)
            if need_a_p:
                z = gpu_products.mm(reference.as_rows(x), gpu.launch().expanded(operand, K, x.dtype, outer=False))
                grads[2 * plane] = (g.float() * z).sum(0).to(a_p.dtype)
            if need_x or need_b_p:
                d = gpu_products.mm(g, gpu.launch().expanded(operand, K, x.dtype, inner=False).T)
                if need_b_p:
                    grads[2 * plane + 1] = (d * reference.as_rows(x).float()).sum(0).to(b_p.dtype)
                if need_x:
                    d = d * b_p.float()
                    sum_x = d if sum_x is None else sum_x + d
        if sum_x is not None:
            grad_x = sum_x.to(x.dtype).reshape(x.shape)
    return grad_x, *grads


gpu.register(onebit_linear, onebit_linear_backward)
