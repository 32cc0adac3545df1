"""What a value of a config must be: each check answers with lines that say what is wrong, none where nothing is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from hf_onebit.byte_sizes import parse_size
from hf_onebit.formats.double_quant import DoubleQuant
from hf_onebit.formats.mbwq import check_blocks
from hf_onebit.formats.mpq import MAX_BITS, MIN_BITS
from hf_onebit.formats.onebit import MAX_PLANES
from hf_onebit.formats.packing import WORD_BITS
from hf_onebit.formats.table import KEYS, KINDS
from hf_onebit.version import __version__

# Widths of packed heads and embeddings. The format has more; these are the ones worth having.
HEAD_BITS = (2, 3, 4, 8)
_METHODS = tuple(KEYS)


def expect(ok: bool, field: str, got: Any, expected: str) -> list[str]:
    """The line of a value that is not what it must be; none where it is. ``expected`` follows "expected"."""
    return [] if ok else [f"{field} is {short(got)}: expected {expected}"]


def short(value: Any) -> str:
    """A value as messages show it: its repr, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_int(field: str, value: Any, low: int, high: int | None = None) -> list[str]:
    """A whole number from ``low`` to ``high``, without an end where that is None; booleans are none."""
    span = f"a whole number >= {low}" if high is None else f"a whole number from {low} to {high}"
    return expect(type(value) is int and value >= low and (high is None or value <= high), field, value, span)


def check_bool(field: str, value: Any) -> list[str]:
    """True or False."""
    return expect(isinstance(value, bool), field, value, "True or False")


def check_head_bits(field: str, value: Any) -> list[str]:
    """None, or a width that heads and embeddings are packed at."""
    expected = f"None (floating point) or one of {', '.join(map(str, HEAD_BITS))}"
    return expect(value is None or (type(value) is int and value in HEAD_BITS), field, value, expected)


def check_group_size(field: str, value: Any) -> list[str]:
    """A multiple of the inputs in a word, or -1 for whole rows."""
    fits = type(value) is int and (value == -1 or (value > 0 and value % WORD_BITS == 0))
    return expect(fits, field, value, f"a multiple of {WORD_BITS}, or -1 for whole rows")


def check_number(field: str, value: Any, above_zero: bool) -> list[str]:
    """A finite number, above zero where that is asked for; booleans are none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    finite = is_number and abs(value) <= sys.float_info.max
    expected = "a finite number > 0" if above_zero else "a finite number"
    return expect(finite and (value > 0 or not above_zero), field, value, expected)


def check_preset(value: Any, presets: Iterable[str]) -> list[str]:
    """One of the presets that the method has."""
    names = list(presets)
    return expect(isinstance(value, str) and value in names, "preset", value, "one of " + ", ".join(map(repr, names)))


def check_patterns(patterns: Any) -> list[str]:
    """``modules_to_not_convert``: None, or names and valid regular expressions."""
    if patterns is None:
        return []
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) and p for p in patterns):
        return expect(False, "modules_to_not_convert", patterns, "None or a list of non-empty strings")
    return check_expressions("modules_to_not_convert", patterns)


def check_expressions(field: str, patterns: Iterable[str]) -> list[str]:
    """Valid regular expressions, each of which that is not has a line."""
    problems = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{field} holds {pattern!r}, which is no valid regular expression: {error}")
    return problems


def check_planes_per_layer(planes: Any) -> list[str]:
    """``planes_per_layer``: None, or planes by name or pattern of layers."""
    if planes is None:
        return []
    if not isinstance(planes, dict) or not all(isinstance(pattern, str) and pattern for pattern in planes):
        return expect(False, "planes_per_layer", planes, "None or a table {name or pattern of layers: 1 or 2}")
    problems = check_expressions("planes_per_layer", planes)
    for pattern, value in planes.items():
        problems += check_int(f"planes_per_layer[{pattern!r}]", value, 1, MAX_PLANES)
    return problems


def check_targets(bpw: Any, size: Any, planes: Any = 1) -> list[str]:
    """``target_bpw`` and ``target_size``: at most one of them, and no ``planes`` beside it."""
    problems = [] if bpw is None else check_number("target_bpw", bpw, above_zero=True)
    try:
        if size is not None:
            parse_size(size)
    except ValueError as error:
        problems.append(f"target_size is {short(size)}: {error}")
    if bpw is not None and size is not None:
        problems.append(f"target_bpw is {short(bpw)} and target_size is {short(size)}: expected one of them at most")
    if (bpw is not None or size is not None) and planes != 1:
        problems.append(
            f"planes is {short(planes)} beside a target, which chooses the layers for a second plane itself: leave "
            "it out; for layers that must have one, use planes_per_layer (--planes-per-layer NAME=2)"
        )
    return problems


def check_modules(modules: Any) -> list[str]:
    """``modules``: the table of packed layers, entry by entry; at most five lines or so."""
    if modules is None:
        return []
    if not isinstance(modules, dict):
        return expect(False, "modules", modules, "None or a table {module name: entry}")
    problems = []
    for name, entry in modules.items():
        problems += _check_entry(name, entry) or _check_tie(name, entry, modules)
        if len(problems) >= 5:  # a table gone wrong is wrong everywhere: five lines tell enough
            break
    return problems


def _check_entry(name: Any, entry: Any) -> list[str]:
    field = f"modules[{name!r}]"
    if not isinstance(name, str) or not name:
        return expect(False, "modules", name, "names that are non-empty strings")
    if not isinstance(entry, dict):
        return expect(
            False,
            field,
            entry,
            'an entry like {"method": "onebit", "bits": 1, "planes": 1, "group_size": null}',
        )
    method = entry.get("method", "onebit")
    if not isinstance(method, str) or method not in _METHODS:
        known = " or ".join(map(repr, _METHODS))
        return expect(
            False,
            f"{field}.method",
            method,
            f"{known}, the methods hf_onebit {__version__} reads (newer releases may read more: pip install -U "
            "hf_onebit)",
        )
    unknown = sorted(set(map(str, entry)) - set(KEYS[method]))
    needed = {"onebit": {"method", "bits", "planes"}, "mpq": {"method", "bits", "group_size", "symmetric"}}
    missing = sorted(needed[method] - set(entry))
    problems = [
        *expect(not unknown, field, unknown, f"no keys beside {', '.join(KEYS[method])}"),
        *expect(not missing, field, entry, f"the keys {', '.join(missing)} as well"),
    ]
    values = _check_mpq_values if method == "mpq" else _check_onebit_values
    return problems or values(field, entry)


def _check_onebit_values(field: str, entry: dict[str, Any]) -> list[str]:
    return [
        *check_int(f"{field}.bits", entry["bits"], 1, 1),
        *check_int(f"{field}.planes", entry["planes"], 1, MAX_PLANES),
        *expect(entry.get("group_size") is None, f"{field}.group_size", entry.get("group_size"), "null for onebit"),
    ]


def _check_mpq_values(field: str, entry: dict[str, Any]) -> list[str]:
    in_features, tied_to, kind = (entry.get(key) for key in ("in_features", "tied_to", "kind"))
    tie_ok = tied_to is None or (isinstance(tied_to, str) and tied_to != "")
    ordered = [key for key in ("g_idx", "q_perm", "blocks") if entry.get(key) not in (None, False)]
    alone = not ({"g_idx"} < set(ordered) or (ordered and kind == "embedding"))
    return [
        *check_int(f"{field}.bits", entry["bits"], MIN_BITS, MAX_BITS),
        *expect(entry.get("planes") is None, f"{field}.planes", entry.get("planes"), "null for mpq"),
        *check_group_size(f"{field}.group_size", entry["group_size"]),
        *check_bool(f"{field}.symmetric", entry["symmetric"]),
        *([] if in_features is None else check_int(f"{field}.in_features", in_features, 1)),
        *expect(kind is None or kind in KINDS, f"{field}.kind", kind, " or ".join(map(repr, KINDS))),
        *expect(tie_ok, f"{field}.tied_to", tied_to, "null or the name of a module"),
        *([] if entry.get("g_idx") is None else check_bool(f"{field}.g_idx", entry["g_idx"])),
        *([] if entry.get("q_perm") is None else check_bool(f"{field}.q_perm", entry["q_perm"])),
        *([] if entry.get("blocks") is None else _check_row_blocks(field, entry)),
        *([] if entry.get("double_quant") is None else _check_double_quant(field, entry["double_quant"])),
        *expect(alone, field, ordered, "g_idx without q_perm or blocks, and none of the three for an embedding"),
    ]


def _check_double_quant(field: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return expect(False, f"{field}.double_quant", value, "null or an object with scale_bits, zero_bits and block")
    try:
        DoubleQuant.from_dict(value)
    except ValueError as error:
        return expect(False, f"{field}.double_quant", value, str(error))
    return []


def _check_row_blocks(field: str, entry: dict[str, Any]) -> list[str]:
    blocks = entry["blocks"]
    try:
        first = check_blocks(blocks, entry.get("in_features"))[0]
    except ValueError as error:
        return expect(False, f"{field}.blocks", blocks, f"row blocks (bits, rows, group_size): {error}")
    agree = (entry["bits"], entry["group_size"]) == (first[0], first[2])
    return expect(agree, f"{field}.bits and group_size", entry, f"those of the first block, {first[0]} and {first[2]}")


def _check_tie(name: str, entry: dict[str, Any], modules: dict[str, dict[str, Any]]) -> list[str]:
    """A shared set of tensors has one entry that owns it, of the same bits and groups."""
    tied_to = entry.get("tied_to")
    if tied_to is None:
        return []
    owner = modules.get(tied_to)
    field = f"modules[{name!r}].tied_to"
    if not isinstance(owner, dict) or owner.get("tied_to") is not None:
        return expect(False, field, tied_to, "the name of a module in the table that owns its tensors")
    alike = all(owner.get(key) == entry.get(key) for key in ("method", "bits", "group_size", "symmetric"))
    alike = alike and not any(entry.get(key) for key in ("g_idx", "q_perm", "blocks"))
    return expect(alike, field, tied_to, "a module with the same method, bits, group_size and symmetric")
