"""Which launch plan a size gets on a GPU: a bounded search by timing, remembered for the device in the user's cache.

A *bucket* is a kind of layer, a dtype, rows up to the next power of two, and outputs and inputs up to the next
quarter of an octave. The first call of a bucket times the usual plan beside a few others (``candidates``); the winner
is kept in ``<cache>/plans/<device>-<key>.json``, where the key names the device, triton and the kernels' sources, and
serves all later calls and processes. Where several processes compute together nothing is searched, and the usual plans
are taken. What a file says is used only where it is a candidate, so a stale or foreign file
can do no harm. A plan changes the order of sums, hence last bits of results: ``HF_ONEBIT_AUTOTUNE=0``, and torch's
``use_deterministic_algorithms``, leave the usual plans, which depend on sizes and dtypes alone.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_onebit.ops import gpu_plans, kernel_cache
from hf_onebit.ops.gpu_clock import device_microseconds
from hf_onebit.ops.gpu_plans import EXPAND, Operand, Plan, ceil, power_of_2

_VARIABLE = "HF_ONEBIT_AUTOTUNE"
_OFF = {"0", "off", "false", "no"}
# Limits of a search: plans, and seconds for one and for all of a process. Most of them is compiling.
MOST_PLANS = 12
SECONDS = 20.0
SECONDS_IN_ALL = 120.0
# Another plan must take this much less time than the usual one.
_GAIN = 0.03
# With more rows the usual plan, a float matrix, is not questioned; with fewer than these a float matrix is not tried.
_MOST_ROWS = 256
_EXPAND_FROM = 16
# Of the largest result, how far two plans may be apart.
_APART = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# {columns of a tile: (outputs, warps)}: tests compile all of them ahead of time.
_TILES = {8: ((64, 1), (32, 1), (64, 2)), 16: ((64, 2), (32, 1), (64, 4)), 32: ((64, 2), (32, 2), (64, 4)),
         64: ((128, 4), (64, 4), (64, 2))}  # fmt: skip
# Warps of the kernel for few rows of signs.
FEW_ROWS_WARPS = (8, 4, 2)
_FORMAT = 1
_SOURCES = ("gpu_plans", "triton_kernels", "triton_launch", "triton_few_rows", "triton_few_rows_launch")

Timer = Callable[[Callable[[], Tensor]], float]

# {device: {bucket: plan, or nothing where the search failed}}
_known: dict[str, dict[str, tuple[int, ...]]] = {}
_spent = 0.0


def enabled() -> bool:
    """Whether plans may be searched for, and those that were found be used."""
    return not bound() and os.environ.get(_VARIABLE, "").strip().lower() not in _OFF


def bound() -> bool:
    """Whether only the usual plans may be taken.

    So it is where torch is to be deterministic, and where processes compute one model together: plans of different
    orders of sums would let them drift apart.
    """
    if torch.are_deterministic_algorithms_enabled():
        return True
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def plan(
    launch: Any, rows: int, K: int, operand: Operand, dtype: torch.dtype, device: torch.device, search: bool
) -> Plan:
    """The plan for ``rows`` rows of ``K`` inputs.

    Args:
        launch: the module ``triton_launch``.
        rows, K: of x.
        operand: the layer.
        dtype: of x.
        device: of all tensors.
        search: whether there may be a search now; it waits for the device.

    Returns:
        What was found before, or now; the usual plan where nothing is searched or the search fails.
    """
    usual = gpu_plans.plan_for(rows, K, operand, dtype, device)
    if not enabled() or rows > _MOST_ROWS:
        return usual
    top = power_of_2(rows)
    allowed = candidates(top, K, operand, dtype, device)
    if len(allowed) == 1:
        return usual
    known, name = _plans_of(device), bucket(top, K, operand, dtype)
    if name not in known and search and _spent < SECONDS_IN_ALL:
        known[name] = _search(launch, top, K, operand, dtype, device, allowed)
        if known[name]:
            _save(device, known)
    return next((each for each in allowed if each == known.get(name)), usual)


def bucket(rows: int, K: int, operand: Operand, dtype: torch.dtype) -> str:
    """Name of what shares a plan; ``rows`` is a power of two."""
    kind = f"mpq{operand.bits}" if operand.is_mpq else f"onebit{operand.planes}"
    zeros = "z" if operand.zeros is not None else ""
    sizes = f"{_round(operand.weight.shape[1])}x{_round(K)}"
    return f"{kind}{zeros} {str(dtype).removeprefix('torch.')} {rows} rows {sizes}"


def candidates(rows: int, K: int, operand: Operand, dtype: torch.dtype, device: torch.device) -> list[Plan]:
    """The plans that are compared, the usual one first; at most ``MOST_PLANS``, all with room for ``rows`` rows."""
    usual = gpu_plans.plan_for(rows, K, operand, dtype, device)
    forced = bool(os.environ.get("HF_ONEBIT_EXPAND_ROWS", ""))
    if not gpu_plans.multiplies_packed(operand, dtype, device) or (forced and usual == EXPAND):
        return [usual]
    plans = [usual]
    if rows >= _EXPAND_FROM and not forced:
        plans.append(EXPAND)
    columns = rows * gpu_plans.parts_of(operand, rows, dtype)
    if gpu_plans.has_few_rows(rows, operand, dtype, device):
        plans += [gpu_plans.few_rows_plan(rows, K, dtype, warps) for warps in FEW_ROWS_WARPS]
    block_c = gpu_plans.columns_of_tile(columns, 64)
    most = min(power_of_2(ceil(K, 512)), gpu_plans.MOST_SPLITS)
    for factor in (1.0, 2.0, 0.5):
        for block_n, warps in tiles_of(block_c, operand.bits, operand.is_mpq, gpu_plans.major(device)):
            splits = gpu_plans.splits_for(operand, columns, K, block_n, block_c, warps, device)
            stages = gpu_plans.stages_for(operand, block_n, block_c, device)
            plans.append(Plan(block_n, block_c, min(max(int(splits * factor), 1), most), warps, stages))
    return list(dict.fromkeys(plans))[:MOST_PLANS]


def tiles_of(block_c: int, bits: int, is_mpq: bool, major: int) -> tuple[tuple[int, int], ...]:
    """(outputs, warps) to look at on devices of a compute capability, those that compile as they should."""
    tiles = _TILES[block_c]
    if block_c == 64:
        if major >= 10:  # others become a trap there
            return (gpu_plans.tile_for(block_c, bits, is_mpq, major),)
        if major == 8:  # and others spill
            return ((64, 4),)
        return tuple(tile for tile in tiles if tile[1] == 4 or not is_mpq)
    if bits > 4 and block_c == 32:  # more outputs would spill
        return tuple(tile for tile in tiles if tile[0] == 32)
    return tiles


def fastest(plans: list[Any], run: Callable[[Any], Tensor], timer: Timer, tolerance: float, seconds: float) -> Any:
    """The plan that takes the least time, the first one unless another is clearly faster.

    Args:
        plans: the usual one first, which must run.
        run: computes the product by a plan; one that raises or differs from the first is left out.
        timer: microseconds of a call.
        tolerance: of the largest result, how far a plan may be off the first.
        seconds: after which no further plan is looked at.
    """
    end = time.monotonic() + seconds
    expected = run(plans[0]).float()
    bound = float(expected.abs().max()) * tolerance
    best, least = plans[0], timer(lambda: run(plans[0])) * (1 - _GAIN)
    for each in plans[1:]:
        if time.monotonic() > end:
            break
        try:
            if not float((run(each).float() - expected).abs().max()) <= bound:
                continue
            took = timer(lambda each=each: run(each))  # type: ignore[misc]
        except Exception:  # a plan that this device cannot run is no plan
            continue
        if took < least:
            best, least = each, took
    return best


def file_of(device: torch.device) -> Path | None:
    """Where the plans of a device are kept; None without a cache."""
    cache = kernel_cache.folder()
    if cache is None:
        return None
    name = _device_name(device)
    key = hashlib.sha256("\0".join((name, _software(), str(_FORMAT))).encode()).hexdigest()[:16]
    return cache / "plans" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:60].strip('-')}-{key}.json"


def forget() -> None:
    """Read the files again, and allow for another ``SECONDS_IN_ALL``."""
    global _spent  # noqa: PLW0603
    _known.clear()
    _spent = 0.0


def _search(
    launch: Any, rows: int, K: int, operand: Operand, dtype: torch.dtype, device: torch.device, plans: list[Plan]
) -> tuple[int, ...]:
    """The fastest of ``plans``, by measuring; nothing where that fails."""
    global _spent  # noqa: PLW0603  (of this process)
    start = time.monotonic()
    try:
        X = torch.randn(rows, K, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
        seconds = min(SECONDS, SECONDS_IN_ALL - _spent)
        return fastest(plans, lambda p: launch.run(X, operand, None, p), device_microseconds, _APART[dtype], seconds)
    except Exception:  # too little memory, for one: the usual plan needs no search
        return ()
    finally:
        _spent += time.monotonic() - start


def _plans_of(device: torch.device) -> dict[str, tuple[int, ...]]:
    key = str(device)
    if key not in _known:
        _known[key] = _read(file_of(device))
    return _known[key]


def _read(path: Path | None) -> dict[str, tuple[int, ...]]:
    """{bucket: plan} of a file; what is not as it should be is left out."""
    if path is None:
        return {}
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    plans = text.get("plans") if isinstance(text, dict) else None
    if not isinstance(plans, dict):
        return {}
    return {
        name: tuple(plan)
        for name, plan in plans.items()
        if isinstance(plan, list) and len(plan) == 5 and all(type(n) is int for n in plan)
    }


def _save(device: torch.device, known: dict[str, tuple[int, ...]]) -> None:
    """Add to the file; another process may have written it meanwhile. Where it cannot be written, nothing is kept."""
    path = file_of(device)
    if path is None:
        return
    plans = _read(path) | {name: found for name, found in known.items() if found}
    text = {"device": _device_name(device), "software": _software(),
            "plans": {name: list(found) for name, found in sorted(plans.items())}}  # fmt: skip
    written: str | None = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            written = file.name
            json.dump(text, file, indent=1)
        os.replace(written, path)
    except OSError:
        if written is not None:
            with contextlib.suppress(OSError):
                os.remove(written)


@functools.cache
def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    capability = ".".join(str(n) for n in torch.cuda.get_device_capability(device))
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return f"{torch.cuda.get_device_name(device)} {capability} {count}"


@functools.cache
def _software() -> str:
    """What a plan's time depends on besides the device."""
    import importlib.metadata

    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build that comes with torch
        version = torch.__version__
    sources = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in _SOURCES)
    return f"triton {version}, kernels {hashlib.sha256(b''.join(sources)).hexdigest()[:16]}"


def _round(n: int) -> int:
    """Up to the next quarter of an octave: 4, 5, 6 or 7 times a power of two."""
    step = max(power_of_2(n + 1) // 8, 1)
    return ceil(n, step) * step
