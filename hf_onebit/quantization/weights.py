"""One weight matrix at a time: float in, packed tensors and a record of their errors out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms import closed_form as algorithm
from hf_onebit.config import OneBitConfig
from hf_onebit.formats import onebit
from hf_onebit.formats.table import TableEntry
from hf_onebit.quantization.group_tensors import dequantize_entry, pack_fit, round_entry


def quantize_weight(
    weight: Tensor, config: OneBitConfig, name: str, planes: int, hessian: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize one weight matrix; the step that both quantizing on load and ``OneBitQuantizer`` take.

    Args:
        weight: (out_features, in_features), any float dtype.
        config: which algorithm.
        name: full name of the layer, for errors.
        planes: sign matrices, 1 or 2.
        hessian: (in_features, in_features) statistics of the inputs, or None.

    Returns:
        the packed tensors by the names of docs/formats.md, on the weight's device, and the layer's record: sizes, bits
        per weight and relative squared errors of exactly those tensors.

    Raises:
        ValueError: the weight holds NaN or inf, or its scales do not fit in float16.
    """
    start = time.perf_counter()
    W = weight.detach().float()
    out_features, in_features = W.shape
    importance = None
    if config.use_importance_scaling and hessian is not None:
        importance = algorithm.importance_from_hessian(hessian)
    fitted = algorithm.closed_form_planes(W, planes, layer=name, importance=importance, **config.algorithm_options())
    tensors = onebit.pack_planes(fitted)
    weight_error, output_error = relative_errors(W, algorithm.dequantize_planes(fitted), hessian)
    record = {
        "in_features": in_features,
        "out_features": out_features,
        "planes": planes,
        "bits_per_weight": onebit.bits_per_weight(in_features, out_features, planes),
        "relative_weight_error": weight_error,
        "relative_output_error": output_error,
        "seconds": time.perf_counter() - start,
    }
    return tensors, record


def quantize_group_weight(
    weight: Tensor, entry: TableEntry, name: str, hessian: Tensor | None = None, search: str = "mse"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize the matrix of a layer, an output head or an embedding in groups of inputs, to its nearest weights.

    Args:
        weight: (out_features, in_features), any float dtype; an embedding as (num_embeddings, embedding_dim).
        entry: bits, group size and whether there are zeros.
        name: full name of the module, for errors.
        hessian: (in_features, in_features) statistics of the inputs, or None; its diagonal weighs the errors.
        search: how scales and zeros are found, see ``quantize_groupwise``.

    Returns:
        the packed tensors by the names of docs/formats.md, on the weight's device, and the module's record, as of
        ``quantize_weight``.

    Raises:
        ValueError: the weight holds NaN or inf, or its scales do not fit in float16.
    """
    start = time.perf_counter()
    importance = None if hessian is None else hessian.diagonal().to(weight.device)
    tensors = pack_fit(round_entry(weight, entry, name, importance, search), entry)
    out_features, in_features = weight.shape
    weight_error, output_error = _group_errors(weight, tensors, entry, hessian)
    record = {
        "method": "mpq",
        "in_features": in_features,
        "out_features": out_features,
        "bits": entry.bits,
        "group_size": entry.group_size,
        "bits_per_weight": entry.bits_per_weight(in_features, out_features),
        "relative_weight_error": weight_error,
        "relative_output_error": output_error,
        "seconds": time.perf_counter() - start,
    }
    if entry.blocks is not None:
        record["blocks"] = [list(block) for block in entry.blocks]
    return tensors, record


# A head has tens of thousands of outputs: this many are unpacked at a time.
_ROWS_AT_ONCE = 4096


def _group_errors(
    weight: Tensor, tensors: Mapping[str, Tensor], entry: TableEntry, H: Tensor | None
) -> tuple[float | None, float | None]:
    """As ``relative_errors``, some outputs at a time."""
    sums = torch.zeros(4, dtype=torch.float64)  # of squares: difference, weight; of outputs: the same
    H = None if H is None else H.to(weight.device)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        W = weight[rows].float()
        part = {key: value if key == "q_perm" else value[:, rows] for key, value in tensors.items()}
        W_q = dequantize_entry(part, entry, weight.shape[1])
        for index, matrix in enumerate((W_q.sub_(W), W)):
            sums[index] += float((matrix * matrix).sum(dtype=torch.float64))
            if H is not None:
                sums[index + 2] += float(((matrix @ H) * matrix).sum(dtype=torch.float64))
    lost, total, lost_out, total_out = sums.tolist()
    return lost / total if total > 0 else None, lost_out / total_out if total_out > 0 else None


def relative_errors(W: Tensor, W_q: Tensor, H: Tensor | None) -> tuple[float | None, float | None]:
    """‖W-Ŵ‖²/‖W‖² and tr(ΔHΔᵀ)/tr(WHWᵀ); None where the denominator is 0 or H is unknown."""
    delta = W_q.sub_(W)
    norm = float(torch.linalg.vector_norm(W)) ** 2
    weight_error = float(torch.linalg.vector_norm(delta)) ** 2 / norm if norm else None
    if H is None:
        return weight_error, None
    H = H.to(W.device)
    output = float(((W @ H) * W).sum(dtype=torch.float64))
    output_error = float(((delta @ H) * delta).sum(dtype=torch.float64)) / output if output > 0 else None
    return weight_error, output_error
