"""Quantization configs: everything a user may set, checked in one place. Pure data, JSON in and out.

A config plays two parts. Given to ``from_pretrained`` or to a quantizer it says how to quantize; read from a
checkpoint's ``config.json`` it says what is packed and how (``modules``, one entry a layer). Nothing in it names code,
files or URLs.
"""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_onebit.byte_sizes import parse_size
from hf_onebit.config_checks import (
    check_bool,
    check_group_size,
    check_head_bits,
    check_int,
    check_modules,
    check_number,
    check_patterns,
    check_planes_per_layer,
    check_preset,
    check_targets,
    expect,
)
from hf_onebit.formats.onebit import FORMAT_VERSION, MAX_PLANES
from hf_onebit.version import __version__

PRESETS: dict[str, str] = {
    "closed": "closed form: signs, and one scale per row and per column; seconds, but noise at one bit",
    "fast": "signs under the full Hessian on the quantized prefix, tuned blocks, then distilled scales; minutes",
    "balanced": "the same with more text and more rounds of each; several times as long",
    "best": "the same with far more of both, and gated sign flips at the end; many times as long",
}
# Tokens of calibration text that a preset is made for.
CALIBRATION_TOKENS = {"closed": 16384, "fast": 81920, "balanced": 196608, "best": 786432}
# Tokens of one calibration sequence.
CALIBRATION_CONTEXT = 2048

# The dataset that the model writes itself.
SELF = "self"
# Bits that the plan chooses.
AUTO = "auto"

# What config.json holds. The remaining options describe one run, not the checkpoint.
_STORED = (
    "quant_method",
    "format_version",
    "preset",
    "planes",
    "iters",
    "use_importance_scaling",
    "use_balancing",
    "balance_iters",
    "balance_alpha",
    "modules_to_not_convert",
    "modules",
)
# Stored where they differ from these values, so that checkpoints without such heads stay readable for older releases.
_STORED_IF_SET: dict[str, Any] = {
    "lm_head_bits": None,
    "embedding_bits": None,
    "head_group_size": 64,
    "untied": False,
}
_RUN_ONLY = (
    "dataset",
    "tokenizer",
    "calibration_tokens",
    "calibration_context",
    "seed",
    "dequantize",
    "fuse_projections",
    "planes_per_layer",
    "target_bpw",
    "target_size",
    "spill",
    "data_parallel",
    "low_memory",
)
# Keys only OneComp writes: it also calls its method "onebit", but stores other tensors under other names.
_ONECOMP_KEYS = ("modules_in_block_to_quantize", "quantized_layer_names", "quantization_bits")


class PackingConfig(QuantizationConfigMixin):
    """What the configs of all methods share; a user meets ``OneBitConfig`` and ``MPQConfig``.

    Attributes:
        method: the method's name, as config.json has it.
        presets: {name: what it does}.
        preset_tokens: {preset: tokens of calibration text that it is made for}.
        stored: fields of config.json.
        stored_if_set: fields of config.json where they differ from these values.
        run_only: the fields that describe one run, not the checkpoint.
    """

    method: ClassVar[str]
    presets: ClassVar[dict[str, str]]
    preset_tokens: ClassVar[dict[str, int]]
    stored: ClassVar[tuple[str, ...]]
    stored_if_set: ClassVar[dict[str, Any]]
    run_only: ClassVar[tuple[str, ...]]

    preset: str
    dataset: Any
    tokenizer: Any
    calibration_tokens: int | None
    calibration_context: int
    seed: int
    modules: dict[str, dict[str, Any]] | None
    modules_to_not_convert: list[str] | None
    format_version: int
    dequantize: bool
    fuse_projections: bool
    lm_head_bits: Any
    embedding_bits: Any
    head_group_size: int
    untied: bool
    spill: bool
    data_parallel: bool
    low_memory: bool | None
    target_bpw: float | None
    target_size: int | str | None

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: with one line a problem: the field, what it is, what it may be.
        """
        _check_version(self.format_version)
        problems = [
            *expect(self.quant_method == self.method, "quant_method", self.quant_method, repr(self.method)),
            *check_preset(self.preset, self.presets),
            *self._own_problems(),
            *check_bool("dequantize", self.dequantize),
            *check_bool("fuse_projections", self.fuse_projections),
            *check_bool("spill", self.spill),
            *check_bool("data_parallel", self.data_parallel),
            *([] if self.low_memory is None else check_bool("low_memory", self.low_memory)),
            *check_int("calibration_tokens", 1 if self.calibration_tokens is None else self.calibration_tokens, 1),
            *check_int("calibration_context", self.calibration_context, 2),
            *check_int("seed", self.seed, 0),
            *check_patterns(self.modules_to_not_convert),
            *([] if self.lm_head_bits == AUTO else check_head_bits("lm_head_bits", self.lm_head_bits)),
            *([] if self.embedding_bits == AUTO else check_head_bits("embedding_bits", self.embedding_bits)),
            *self._auto_head_problems(),
            *check_group_size("head_group_size", self.head_group_size),
            *check_bool("untied", self.untied),
            *check_modules(self.modules),
        ]
        if problems:
            raise ValueError(f"{type(self).__name__} is not valid:\n" + "\n".join(f"  - {p}" for p in problems))

    def _own_problems(self) -> list[str]:
        """What is wrong with the fields of one method."""
        raise NotImplementedError

    def _auto_head_problems(self) -> list[str]:
        """Who may leave the bits of head and embedding to the plan."""
        asked = [name for name in ("lm_head_bits", "embedding_bits") if getattr(self, name) == AUTO]
        if not asked or (self.chooses_bits and self.target_size is not None):
            return []
        return [
            f"{asked[0]} is 'auto': expected a number without MPQConfig(bits='auto', target_size=...) "
            f"(--method mpq --bits auto --target-size SIZE)"
        ]

    @property
    def chooses_bits(self) -> bool:
        """Whether the layers' bits are chosen by the plan (``bits="auto"``)."""
        return getattr(self, "bits", None) == AUTO

    @property
    def whole(self) -> bool:
        """Whether quantizing takes the whole float model in memory: to run it on text, or to compare its layers."""
        return self.calibrates or self.chooses_bits

    @property
    def target_bytes(self) -> int | None:
        """``target_size`` in bytes."""
        return None if self.target_size is None else parse_size(self.target_size)

    @property
    def writes_itself(self) -> bool:
        """Whether the calibration text is one that the model writes itself."""
        if self.dataset is None:
            return self.preset != "closed"
        return isinstance(self.dataset, str) and self.dataset == SELF

    @property
    def calibrates(self) -> bool:
        """Whether quantizing takes data, and with it the whole float model in memory."""
        return self.dataset is not None or self.writes_itself

    @property
    def tokens_wanted(self) -> int:
        """``calibration_tokens``, or what the preset is made for."""
        return self.preset_tokens[self.preset] if self.calibration_tokens is None else self.calibration_tokens

    def to_dict(self) -> dict[str, Any]:
        """The stored part as JSON types: without ``dataset``, ``tokenizer`` and the other options of one run."""
        stored = {key: getattr(self, key) for key in self.stored}
        stored |= {key: value for key, unset in self.stored_if_set.items() if (value := getattr(self, key)) != unset}
        if self.modules is not None:
            stored["modules"] = {name: dict(entry) for name, entry in self.modules.items()}
        if self.modules_to_not_convert is not None:
            stored["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return stored

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def _refuse_unknown(self, unknown: dict[str, Any]) -> None:
        """Refuse keywords that are no fields, with the nearest ones; those of another writer first."""
        if unknown:
            known = [*self.stored, *self.stored_if_set, *self.run_only]
            _refuse_unknown(type(self).__name__, unknown, known)


class OneBitConfig(PackingConfig):
    """How to quantize the linear layers of a model to one bit per weight, W ≈ Σ_p diag(a_p) S_p diag(b_p).

    Args:
        planes: 1 or 2 sign matrices per layer (about 1 or 2 bits per weight).
        planes_per_layer: another number of them for some layers, {pattern: planes}, with patterns as in
            ``modules_to_not_convert``. Of the entries that match a layer, the first counts, so put exceptions first.
            Not stored, since JSON would lose that order: ``modules`` records what each layer got.
        target_bpw: bits per weight of the layers packed by this method together, scales and biases included; never
            exceeded. Which layers get a second plane is decided by how sensitive the model is to each, measured on
            ``dataset`` (docs/methods/allocation.md); what ``planes_per_layer`` says of a layer stays. Not stored.
        target_size: the same as a size of all weight files together, whatever is in them: bytes, or a text like
            "60MB" or "1.5GiB" (MB is 10⁶ bytes, MiB 2²⁰). Not stored.
        preset: which algorithms choose the bits; one of ``PRESETS``.
        modules_to_not_convert: modules to leave in floating point with all that is in them, by full name, by a leading
            or trailing part of it of whole words between dots ("mlp", "layers.0"), or by regular expression that takes
            the name from its start up to a dot. ``None`` leaves out the output head, the last layer and the
            vision and audio towers. A list of your own replaces those defaults. Layers that cannot be packed (tied
            weights, fewer than 32 inputs, modules whose code reads ``.weight`` itself, ...) are left out in either
            case.
        lm_head_bits: pack the output head at so many bits, one of ``HEAD_BITS``, in groups with a scale each ("mpq",
            docs/formats.md). None leaves it in floating point. It comes before the default of
            ``modules_to_not_convert``; a list of your own that names the head contradicts it.
        embedding_bits: the same for the token embedding. Where a model ties head and embedding, equal bits keep them
            tied and stored once; else they are untied, which ``untied`` records.
        head_group_size: inputs that share a scale in head and embedding: a multiple of 32, or -1 for whole rows.
        iters: rounds of alternating least squares for the scales, >= 0. This and the next four are of the closed
            form; the other presets do not read them.
        use_importance_scaling: weigh input features by their mean square in the calibration text.
        use_balancing: balance rows and columns (Sinkhorn, L1) before the scales are fitted. Off here, though on in
            ``Onebit``: beside importance it raises the layers' output errors (docs/methods/onebit.md).
        balance_iters: rounds of balancing, >= 1 when it is on.
        balance_alpha: row mass balanced to, > 0; a pure gauge.
        dataset: what to calibrate on: a text file's path, strings, token dicts, conversations (lists of messages, put
            through the chat template), a ``.jsonl`` file's path, a ``datasets.Dataset``, or "self" for text that the
            model writes itself. None means no data with ``preset="closed"``, and "self" with every other preset. A file
            of that name is ``"./self"``. Not stored.
        tokenizer: tokenizer for ``dataset``, an object or the name of one. Not stored.
        calibration_tokens: how many tokens of ``dataset`` to use at the most; None for as many as the preset is made
            for (``CALIBRATION_TOKENS``). Token dicts that hold more are passed over; where all do, the shortest is
            used. Not stored.
        calibration_context: length of one calibration sequence in tokens, at most the model's positions. Not stored.
        seed: chooses which sequences of ``dataset`` are used when it holds more than enough, and what the model writes
            itself. Not stored.
        modules: what is packed, {module name: entry} (``formats.table``); written by quantization.
        untied: the float model tied its head to its embedding, and this checkpoint holds one of each; written by
            quantization.
        format_version: version of the stored format; this release reads versions up to ``FORMAT_VERSION``.
        dequantize: load the checkpoint into float layers; set by ``hf_onebit.load(path, dequantize=True)``, since
            Transformers takes the config of a packed checkpoint from its file. Quantizing refuses it. Not stored.
        fuse_projections: compute layers that read the same tensor in one call (``hf_onebit.nn.fuse_projections``).
            For packed checkpoints: ``hf_onebit.load(path, fuse_projections=True)``. Not stored.
        spill: keep the hidden states of calibration sequences in files instead of memory; the result is the same. Not
            stored.
        data_parallel: share the calibration sequences among the processes of ``torch.distributed``'s default group,
            where there is one (docs/large_models.md). False: this process works alone. Not stored.
        low_memory: quantize a checkpoint block by block from its files, with one block in memory at a time
            (docs/large_models.md). None: where memory is short, and the preset and the data allow it. Not stored.

    Raises:
        ValueError: any value is of the wrong type or range, or a keyword is unknown; one message lists every problem.
    """

    method = "onebit"
    presets = PRESETS
    preset_tokens = CALIBRATION_TOKENS
    stored = _STORED
    stored_if_set = _STORED_IF_SET
    run_only = _RUN_ONLY

    def __init__(
        self,
        planes: int = 1,
        preset: str = "closed",
        modules_to_not_convert: list[str] | None = None,
        iters: int = 10,
        use_importance_scaling: bool = True,
        use_balancing: bool = False,
        balance_iters: int = 40,
        balance_alpha: float = 1.0,
        dataset: Any = None,
        tokenizer: Any = None,
        calibration_tokens: int | None = None,
        calibration_context: int = CALIBRATION_CONTEXT,
        seed: int = 0,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        dequantize: bool = False,
        fuse_projections: bool = False,
        quant_method: str = "onebit",
        lm_head_bits: int | None = None,
        embedding_bits: int | None = None,
        head_group_size: int = 64,
        untied: bool = False,
        planes_per_layer: dict[str, int] | None = None,
        target_bpw: float | None = None,
        target_size: int | str | None = None,
        spill: bool = False,
        data_parallel: bool = True,
        low_memory: bool | None = None,
        **unknown: Any,
    ) -> None:
        self._refuse_unknown(unknown)
        self.quant_method = quant_method  # type: ignore[assignment]  # the base class types it as its own enum
        self.format_version = format_version
        self.preset = preset
        self.planes = planes
        self.iters = iters
        self.use_importance_scaling = use_importance_scaling
        self.use_balancing = use_balancing
        self.balance_iters = balance_iters
        self.balance_alpha = balance_alpha
        self.modules_to_not_convert = modules_to_not_convert
        self.modules = modules
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.calibration_tokens = calibration_tokens
        self.calibration_context = calibration_context
        self.seed = seed
        self.dequantize = dequantize
        self.lm_head_bits = lm_head_bits
        self.embedding_bits = embedding_bits
        self.head_group_size = head_group_size
        self.untied = untied
        self.fuse_projections = fuse_projections
        self.planes_per_layer = planes_per_layer
        self.target_bpw = target_bpw
        self.target_size = target_size
        self.spill = spill
        self.data_parallel = data_parallel
        self.low_memory = low_memory
        self.validate()

    def _own_problems(self) -> list[str]:
        return [
            *check_int("planes", self.planes, 1, MAX_PLANES),
            *check_int("iters", self.iters, 0),
            *check_bool("use_importance_scaling", self.use_importance_scaling),
            *check_bool("use_balancing", self.use_balancing),
            *check_planes_per_layer(self.planes_per_layer),
            *check_targets(self.target_bpw, self.target_size, self.planes),
            # Out of use they may be zero, but never what JSON cannot hold.
            *check_int("balance_iters", self.balance_iters, 1 if self.use_balancing is True else 0),
            *check_number("balance_alpha", self.balance_alpha, above_zero=self.use_balancing is True),
        ]

    def algorithm_options(self) -> dict[str, Any]:
        """Keyword arguments of ``algorithms.closed_form.closed_form`` (importance excepted)."""
        return {
            "iters": self.iters,
            "use_balancing": self.use_balancing,
            "balance_iters": self.balance_iters,
            "balance_alpha": self.balance_alpha,
        }


def _refuse_unknown(owner: str, unknown: dict[str, Any], known: list[str]) -> None:
    foreign = sorted(set(unknown) & set(_ONECOMP_KEYS))
    if foreign:
        raise ValueError(
            f'This checkpoint says quant_method "onebit", but was written by OneComp, not by hf_onebit (its config'
            f" holds {', '.join(foreign)}). Its tensors have other names and another bit order. "
            "Convert it: hf-onebit import SRC -o DIR, or load it with hf_onebit.load(SRC)"
        )
    lines = []
    for key in sorted(map(str, unknown)):
        close = difflib.get_close_matches(key, known, n=1)
        lines.append(f"  - {key!r}" + (f": did you mean {close[0]!r}?" if close else ""))
    raise ValueError(
        f"{owner} got unknown keys:\n" + "\n".join(lines) + f"\nKnown keys: {', '.join(sorted(known))}. "
        "If a newer hf_onebit wrote this checkpoint: pip install -U hf_onebit"
    )


def _check_version(version: Any) -> None:
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version is {version!r}: expected a whole number from 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"This checkpoint has format_version {version}, and hf_onebit {__version__} reads versions up to "
            f"{FORMAT_VERSION}. Update it: pip install -U hf_onebit"
        )
