"""Checkpoints as other programs write them, made from the formats' descriptions and nothing of the package.

Bits are handled as whole numbers of Python, one column after the other: slow, and hard to get wrong twice in the same
way. Every writer returns what the weights are: {layer: float64 (out, in)}.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (count, columns) -> int32 (ceil(count * bits / 32), columns): each column one little-endian stream."""
    count, columns = codes.shape
    words = -(-count * bits // 32)
    packed = np.zeros((words, columns), dtype=np.uint32)
    for column in range(columns):
        stream = sum(int(code) << (i * bits) for i, code in enumerate(codes[:, column]))
        packed[:, column] = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(words)]
    return packed.view(np.int32)


def unpack_stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undo `pack_stream`."""
    codes = np.zeros((count, words.shape[1]), dtype=np.int64)
    for column in range(words.shape[1]):
        stream = sum(int(w) << (32 * i) for i, w in enumerate(words[:, column].view(np.uint32)))
        codes[:, column] = [(stream >> (i * bits)) & ((1 << bits) - 1) for i in range(count)]
    return codes


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def _save(model: Any, folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None) -> None:
    """A folder with the model's own float tensors (in float16) beside the packed ones."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = {key.rpartition(".")[0] for key in tensors}
    tied = getattr(model.config, "tie_word_embeddings", False)
    for key, value in model.state_dict().items():
        owner = key.rpartition(".")[0]
        if (owner in packed and key.endswith(".weight")) or (tied and key == "lm_head.weight"):
            continue
        tensors.setdefault(key, value.to(torch.float16).contiguous().clone())
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["dtype"] = "float16"
    config["architectures"] = [type(model).__name__]
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_gptq(
    model: Any,
    folder: Path,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = False,
    desc_act: bool = False,
    version: int = 1,
    lowest_zero: int = 1,
    quantizer: str = "auto_gptq:0.7.1",
    extra: dict[str, Any] | None = None,
    layers: dict[str, nn.Linear] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What auto-gptq and gptqmodel write; zero points of 0 as gptqmodel, off whole words."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, torch.Tensor] = {}
    expected = {}
    for name, module in (layers or linear_layers(model)).items():
        n, k = module.out_features, module.in_features
        size = k if group_size == -1 else group_size
        groups = -(-k // size)
        q = rng.integers(0, 1 << bits, (k, n))
        scales = (rng.uniform(0.5, 1.5, (groups, n)) * 0.05 / (1 << bits)).astype(np.float16)
        zeros = np.full((groups, n), 1 << (bits - 1)) if sym else rng.integers(lowest_zero, 1 << bits, (groups, n))
        g_idx = np.arange(k) // size
        if desc_act:
            g_idx = g_idx[rng.permutation(k)]
        stored = pack_stream(zeros.T, bits).view(np.uint32).astype(np.int64).T
        if version == 1 and bits == 3:
            stored = pack_stream((zeros.T - 1) % 8, bits).view(np.uint32).astype(np.int64).T
        elif version == 1:
            stored = (stored - sum(1 << s for s in range(0, 32, bits))) % (1 << 32)
        tensors[f"{name}.qweight"] = torch.from_numpy(pack_stream(q, bits).copy())
        tensors[f"{name}.qzeros"] = torch.from_numpy(stored.astype(np.uint32).view(np.int32).copy())
        tensors[f"{name}.scales"] = torch.from_numpy(scales)
        tensors[f"{name}.g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
        if module.bias is not None:
            tensors[f"{name}.bias"] = module.bias.detach().to(torch.float16).clone()
        else:  # auto-gptq writes one all the same
            tensors[f"{name}.bias"] = torch.zeros(n, dtype=torch.float16)
        expected[name] = (scales.astype(np.float64)[g_idx] * (q - zeros[g_idx])).T
    quantization: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group_size}
    quantization |= {"sym": sym, "desc_act": desc_act, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    quantization |= {"meta": {"quantizer": [quantizer]}, **(extra or {})}
    _save(model, folder, tensors, quantization)
    return expected


def write_onecomp(
    model: Any, folder: Path, balanced: bool = False, extra: dict[str, Any] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """What OneComp writes for its onebit."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, torch.Tensor] = {}
    expected = {}
    for name, module in linear_layers(model).items():
        n, k = module.out_features, module.in_features
        a, b = (rng.uniform(0.1, 0.3, size).astype(np.float16) for size in (n, k))
        signs = rng.integers(0, 2, (n, k))
        text = "".join(map(str, signs.reshape(-1)))
        text += "1" * (-len(text) % 8)
        raw = [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
        tensors[f"{name}.sign_packed"] = torch.tensor(raw, dtype=torch.uint8)
        tensors[f"{name}.a"], tensors[f"{name}.b"] = torch.from_numpy(a), torch.from_numpy(b)
        if module.bias is not None:
            tensors[f"{name}.bias"] = module.bias.detach().to(torch.float16).clone()
        expected[name] = a.astype(np.float64)[:, None] * (2 * signs - 1) * b.astype(np.float64)
    names = list(expected)
    quantization = {"quant_method": "onebit", "bits": 1, "iters": 10, "use_importance_scaling": True}
    quantization |= {"use_balancing": balanced, "balance_iters": 40, "balance_alpha": 1.0}
    quantization |= {"modules_in_block_to_quantize": names, "quantized_layer_names": names, "rotated": False}
    quantization |= {"fp32_had": False, "quantization_bits": [{"mlp.up_proj": {"bits": 1, "method": "onebit"}}]}
    _save(model, folder, tensors, quantization | (extra or {}))
    return expected


def write_bitorch(
    model: Any, folder: Path, kind: str, bits: int = 4, group_size: int = 32, seed: int = 0
) -> dict[str, np.ndarray]:
    """What bitorch-engine writes.

    `kind`: "statistics" (scales and zeros as codes of four bits), "plain" (as they are), "packed-zeros" (zero points as
    in GPTQ, scales as codes of eight bits), "layer-mix" (one width, inputs in an order of their own), "channel-mix" (4
    and 2 bits).
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, torch.Tensor] = {}
    expected = {}
    for name, module in linear_layers(model).items():
        n, k = module.out_features, module.in_features
        groups = -(-k // group_size)
        put = {}
        perm = rng.permutation(k) if kind.endswith("mix") else np.arange(k)
        if kind == "channel-mix":
            wide = k // 2
            q = np.concatenate((rng.integers(0, 16, (wide, n)), rng.integers(0, 4, (k - wide, n))))
            words = [pack_stream(q[:wide], 4), pack_stream(q[wide:], 2)]
            g = np.concatenate((np.arange(wide) // group_size, np.arange(k - wide) // 32 + -(-wide // group_size)))
            starts, row = [], 0
            for width, rows, size in ((4, wide, group_size), (2, k - wide, 32)):
                for first in range(0, rows, size):
                    starts += [width, row]
                    row += min(size, rows - first) * width // 32
            put["q_groups"] = torch.tensor(starts, dtype=torch.int16)
            put["qweight"] = torch.from_numpy(np.concatenate(words).copy())
            groups = int(g.max()) + 1
        else:
            q = rng.integers(0, 1 << bits, (k, n))
            g = np.arange(k) // group_size
            put["qweight"] = torch.from_numpy(pack_stream(q, bits).copy())
        if kind in ("statistics", "packed-zeros"):
            block = 32
            shape = groups, n // block, block
            code = rng.integers(0, 16 if kind == "statistics" else 256, shape)
            second = {"scales_zeros": -3.0, "scales_scales": 0.002, "zeros_zeros": -2.0, "zeros_scales": 0.01}
            half = {
                key: (value * rng.uniform(0.5, 1.5, (groups, n // block, 1))).astype(np.float16)
                for key, value in second.items()
            }
            # In float16 step by step, as the program computes.
            scales = ((code.astype(np.float16) - half["scales_zeros"]) * half["scales_scales"]).reshape(groups, n)
            put["qscales_zeros"], put["qscales_scales"] = (
                torch.from_numpy(half[f"scales_{part}"]) for part in ("zeros", "scales")
            )
        else:
            scales = rng.uniform(0.001, 0.004, (groups, n)).astype(np.float16)
            put["scales"] = torch.from_numpy(scales)
        if kind == "statistics":
            low = rng.integers(0, 16, shape)
            zeros = ((low.astype(np.float16) - half["zeros_zeros"]) * half["zeros_scales"]).reshape(groups, n)
            put["qstatistic"] = torch.from_numpy((code * 16 + low).astype(np.uint8))
            put["qzeros_zeros"], put["qzeros_scales"] = (
                torch.from_numpy(half[f"zeros_{part}"]) for part in ("zeros", "scales")
            )
            offset = zeros.astype(np.float64)
        elif kind == "packed-zeros":
            points = rng.integers(1, 1 << bits, (groups, n))
            put["qscales"] = torch.from_numpy(code.astype(np.uint8))
            put["qzeros"] = torch.from_numpy(pack_stream(points.T - 1, bits).T.copy())
            offset = scales.astype(np.float64) * points
        else:
            zeros = rng.uniform(0.0, 0.03, (groups, n)).astype(np.float16)
            put["zeros"], offset = torch.from_numpy(zeros), zeros.astype(np.float64)
        if kind.endswith("mix"):
            put["q_perm"] = torch.from_numpy(perm.astype(np.uint16).view(np.int16).copy())
            put["channel_scale"] = torch.ones(1, 1, k, dtype=torch.float16)
        else:
            put["g_idx"] = torch.from_numpy(g.astype(np.int32))
        tensors |= {f"{name}.{key}": value for key, value in put.items()}
        packed = scales.astype(np.float64)[g] * q - offset[g]
        weight = np.empty((k, n))
        weight[perm] = packed
        expected[name] = weight.T
    _save(model, folder, tensors, None)
    if kind.endswith("mix"):
        (folder / "quant_strategy.json").write_text(json.dumps({"measurement": {}}))
    return expected
