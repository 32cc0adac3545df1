"""What quantization did, as JSON types: the report's making, and what is said of it at the end."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hf_onebit.calibration import CalibrationData
from hf_onebit.config import PackingConfig
from hf_onebit.evaluation import peak_memory_mb
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.replace import LayerPlan, PackedModule, module_shape, packed_layers
from hf_onebit.progress import logger
from hf_onebit.report import coverage_line
from hf_onebit.version import __version__

LOW_COVERAGE = 0.9


def build_report(
    config: PackingConfig,
    records: Mapping[str, Mapping[str, Any]],
    plan: LayerPlan,
    model: nn.Module,
    data: CalibrationData | None,
    start: float,
) -> dict[str, Any]:
    """What quantization did, as JSON types; ``start`` is a ``time.perf_counter()``."""
    import transformers

    packed = packed_layers(model)
    complete = {
        name: {**record, "bits_per_weight": _stored_bits(packed[name], plan.entries.get(name))}
        for name, record in records.items()
    }
    embeddings = {name: record for name, record in complete.items() if name == plan.heads.embedding}
    layers = {name: record for name, record in complete.items() if name not in embeddings}
    inner = {name: record for name, record in layers.items() if name not in plan.heads.entries}

    return {
        "method": config.quant_method,
        "preset": config.preset,
        "planes": getattr(config, "planes", None),
        "bits": getattr(config, "bits", None),
        "group_size": getattr(config, "group_size", None),
        "symmetric": getattr(config, "symmetric", None),
        "layers": layers,
        "head": plan.heads.head if plan.heads.head in layers else None,
        "embeddings": embeddings,
        "untied": _cost_of_untying(plan, packed),
        "skipped": {name: {"reason": s.reason, "weights": s.weights} for name, s in plan.skipped.items()},
        "coverage": plan.coverage,
        "starved_experts": {n: r["starved_tokens"] for n, r in layers.items() if "starved_tokens" in r} or None,
        "linear_bpw": mean_bits(layers) or 0.0,
        "onebit_bpw": mean_bits(inner),
        "file_bpw": None,
        "file_bytes": None,
        "float_bytes": None,
        "total_weights": None,
        "seconds": time.perf_counter() - start,
        "peak_memory_mb": peak_memory_mb(),
        "calibration": None if data is None else {"source": data.source, "tokens": data.tokens, "sha256": data.sha256},
        "seed": config.seed,
        "allocation": None,
        "preflight": None,
        "output_errors": None,
        "fit": None,
        "command": None,
        "versions": {
            "hf_onebit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _stored_bits(module: PackedModule, entry: TableEntry | None) -> float:
    """Bits per weight in the file, bias included."""
    if entry is None or entry.double_quant is None:
        return module.bits_per_weight()
    bias, shape = getattr(module, "bias", None), module_shape(module)
    assert shape is not None
    bias_bits = 0 if bias is None else 8 * bias.element_size()
    return entry.bits_per_weight(shape.in_features, shape.out_features, bias_bits)


def mean_bits(layers: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Bits per weight of these layers together, from their records; None where there are none."""
    weights = {name: record["in_features"] * record["out_features"] for name, record in layers.items()}
    bits = sum(record["bits_per_weight"] * weights[name] for name, record in layers.items())
    return bits / sum(weights.values()) if weights else None


def _cost_of_untying(plan: LayerPlan, packed: Mapping[str, PackedModule]) -> dict[str, Any] | None:
    """Why head and embedding are no longer one, and the bytes of the second one; None where nothing was untied."""
    heads = plan.heads
    if not heads.untied or heads.head is None:
        return None
    module = packed.get(heads.head) or packed[next(iter(heads.entries))]
    names = (*module.scale_names, "weight")
    return {"reason": heads.why, "bytes": sum(getattr(module, name).nbytes for name in names)}


def warn_of_size(report: Mapping[str, Any]) -> None:
    """The size was planned for weight files of the usual size; more and smaller ones have more headers."""
    allocation, size = report.get("allocation") or {}, report.get("file_bytes")
    if allocation.get("target") == "size" and size is not None and size > allocation["wanted"]:
        logger.warning(
            f"The weight files take {size} bytes, {size - allocation['wanted']:.0f} more than target_size: save with a "
            "larger max_shard_size"
        )


def announce(report: Mapping[str, Any]) -> None:
    """Log the coverage line, and warn where less than 90 % of the linear weights were packed."""
    line = coverage_line(report)
    if report["coverage"] < LOW_COVERAGE:
        reasons: Iterable[str] = sorted({entry["reason"] for entry in report["skipped"].values()})
        logger.warning(f"{line} The rest stays in floating point: {'; '.join(reasons)}.")
    else:
        logger.info(line)
    if starved := report.get("starved_experts"):
        first = min(starved, key=lambda name: starved[name])
        logger.warning(
            f"{len(starved)} matrices of experts saw fewer calibration tokens than they have inputs ({first} saw "
            f"{starved[first]}) and were fitted to what their layer's experts see together: more text, or more varied, "
            "reaches more of them (calibration_tokens)"
        )
