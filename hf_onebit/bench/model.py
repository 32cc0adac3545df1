"""A whole packed model beside its bf16 twin and llama.cpp: prefill and decoding, in turn, round by round."""

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_onebit import loading
from hf_onebit.bench import gguf_file
from hf_onebit.bench.arguments import WrongArgument
from hf_onebit.bench.ggml import Ggml
from hf_onebit.bench.layers import WrongResult
from hf_onebit.bench.llama import LlamaProcess
from hf_onebit.bench.rounds import median_ratio
from hf_onebit.choices import Choice, name_of
from hf_onebit.config import OneBitConfig
from hf_onebit.evaluation import resident_bytes, tensor_bytes, timed_generation
from hf_onebit.formats.table import TableEntry
from hf_onebit.mpq_config import MPQConfig
from hf_onebit.nn import MPQLinear, OneBitLinear
from hf_onebit.nn.replace import entry_of, packed_layers
from hf_onebit.quantization.planning import attach, plan_layers
from hf_onebit.storage import checkpoint

# Models that are made on the spot, with random weights: the sizes of their LlamaConfig.
RANDOM_MODELS: dict[str, dict[str, int]] = {
    "llama-0.8b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 49152,
    }
}
# Of the head of those models; their embedding is a table in bfloat16, of which a token reads one row.
_HEAD_BITS = 4
# Least cosine between the logits of a rival and those of the bf16 model. What is rounded again has no such bound.
LEAST_COSINE = 0.98


@dataclass
class ModelRival:
    """One model in one program.

    Args:
        name: how it is called in the results.
        generate: (ids, new tokens) -> seconds to the first new token, and from there to the last.
        logits: ids -> logits (vocabulary,) after the last of them.
        about: the formats of its linear layers and of its head.
        size: bytes of its weights.
        resident: how much memory this process held more once it was loaded and had run; None where that is not told.
        least_cosine: see ``LEAST_COSINE``; None for no bound.
    """

    name: str
    generate: Callable[[Tensor, int], tuple[float, float]]
    logits: Callable[[Tensor], Tensor]
    about: dict[str, str]
    size: int
    resident: int | None
    least_cosine: float | None = LEAST_COSINE


def bench_model(
    source: str,
    *,
    against: Sequence[str] = ("bf16", "ggml"),
    gguf: Sequence[str] = ("q1_0",),
    packed: Sequence[str] = ("1p",),
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    threads: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time a packed model: a prompt, and greedy decoding after it, at batch 1.

    Args:
        source: a packed checkpoint in a local folder, or a name of ``RANDOM_MODELS``.
        against: "bf16", the same model with the weights that the packed ones stand for, in Transformers; "ggml",
            llama.cpp with those weights rounded to its types.
        gguf: types of llama.cpp's linear layers, of ``gguf_file.LINEAR_TYPES``.
        packed: how the linear layers of one of ``RANDOM_MODELS`` are packed, as ``choices.Choice`` names it ("1p",
            "4g64"). The first is the packed model that the others are held against; more of them are rivals of their
            own, each with random weights of its own. A folder is packed already, and has no choice.
        prompt_tokens, new_tokens: lengths.
        rounds: timings of each; one more, first, is not counted.
        threads: for llama.cpp; torch's are the caller's.
        say: is given a line as each figure comes.

    Returns:
        {model, prompt_tokens, new_tokens, rounds, parameters, packed_file_bytes, tensor_bytes, tensors_by_file, rivals:
        {name: {prefill_tokens_per_s, decode_tokens_per_s, prefill_by_packed, decode_by_packed, linear, head, bytes,
        resident_bytes, cosine}}, skipped: [{contender, reason}]}. ``*_by_packed`` is the median over rounds of the
        rival's time by the packed model's in the same round.

    Raises:
        ValueError: a length or name is out of range, ``source`` is no packed checkpoint, or it is one and more than the
            default of ``packed`` was asked for.
        WrongResult: the packed model's logits are not those of its bf16 twin.
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("rounds", rounds, 1),
    ):
        if value < least:
            raise WrongArgument(f"{name} is {value}, expected at least {least}")
    for kind in gguf:
        if kind not in gguf_file.LINEAR_TYPES:
            raise WrongArgument(f"gguf is {kind!r}, expected one of {', '.join(gguf_file.LINEAR_TYPES)}")
    choices = _choices(source, packed)
    with tempfile.TemporaryDirectory(prefix="hf-onebit-bench-") as scratch, contextlib.ExitStack() as processes:
        folders = [source]
        if source in RANDOM_MODELS:
            folders = [os.path.join(scratch, name) for name in packed]
            for name, choice, folder in zip(packed, choices, folders, strict=True):
                say(f"making {source}, {name}")
                write_random_llama(folder, RANDOM_MODELS[source], choice)
        folder = folders[0]
        before = resident_bytes()
        model = load_packed(folder)
        ids = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
        sizes = {"packed_file_bytes": _file_bytes(folder), "tensor_bytes": tensor_bytes(model)}
        rivals, skipped = [_transformers_rival("packed", model, ids, before)], list[dict[str, str]]()
        for name, other in zip(packed[1:], folders[1:], strict=True):
            before = resident_bytes()
            rivals.append(_transformers_rival(f"packed {name}", load_packed(other), ids, before))
        cosines = {}
        if "bf16" in against:
            cosines = {rival.name: _agrees(rival, ids, at) for rival, at in zip(rivals[1:], folders[1:], strict=True)}
        if "bf16" in against or "ggml" in against:
            before = resident_bytes()
            twin = loading.load(folder, dequantize=True, dtype=torch.bfloat16).eval()
            sizes["parameters"] = sum(parameter.numel() for parameter in twin.parameters())
            rivals.append(_transformers_rival("bf16", twin, ids, before))
            if "ggml" in against:
                head = rivals[0].about["head"]
                start = Starter(Path(scratch), ids, new_tokens, threads, processes)
                theirs, skipped = _llama_rivals(twin, gguf, head, start)
                rivals += theirs
        for entry in skipped:
            say(f"skipped: {entry['contender']}: {entry['reason']}")
        cosines |= _check([rival for rival in rivals if rival.name not in cosines], ids)
        if "bf16" not in against:
            rivals = [rival for rival in rivals if rival.name != "bf16"]
        times = _time(rivals, ids, new_tokens, rounds)
    found = {}
    for rival in rivals:
        prefill, decode = times[rival.name]
        found[rival.name] = {
            "prefill_tokens_per_s": prompt_tokens / statistics.median(prefill),
            "decode_tokens_per_s": (new_tokens - 1) / statistics.median(decode),
            "prefill_by_packed": median_ratio(prefill, times["packed"][0]),
            "decode_by_packed": median_ratio(decode, times["packed"][1]),
            **rival.about,
            "bytes": rival.size,
            "resident_bytes": rival.resident,
            "cosine": cosines.get(rival.name),
        }
    return {
        "model": source,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "parameters": sizes.get("parameters"),
        **sizes,
        "tensors_by_file": sizes["tensor_bytes"] / sizes["packed_file_bytes"],
        "rivals": found,
        "skipped": skipped,
    }


def load_packed(folder: str) -> Any:
    """The packed model, as its users load it."""
    return loading.load(folder).eval()


def _choices(source: str, packed: Sequence[str]) -> list[Choice]:
    if source not in RANDOM_MODELS and tuple(packed) != ("1p",):
        known = ", ".join(RANDOM_MODELS)
        raise WrongArgument(
            f"packed is {list(packed)}, but {source!r} is packed already: it is for {known}, made on the spot"
        )
    if not packed or len(set(packed)) < len(packed):
        raise WrongArgument(f"packed is {list(packed)}: expected one name or more, none of them twice")
    choices = []
    for name in packed:
        try:
            choices.append(Choice.parse(name))
        except ValueError as error:
            raise WrongArgument(f"packed is {name!r}: {error}") from error
        if choices[-1].mixed:
            raise WrongArgument(f"packed is {name!r}: a random model has no importance to give several widths by")
    return choices


def write_random_llama(folder: str, sizes: dict[str, int], choice: Choice | None = None) -> None:
    """A packed checkpoint of a Llama model with random weights and a 4-bit head, made without its float weights.

    Args:
        folder: where.
        sizes: of its LlamaConfig.
        choice: how its linear layers are packed; None for one sign matrix.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    choice = choice or Choice.parse("1p")
    config: OneBitConfig | MPQConfig
    if choice.planes:
        config = OneBitConfig(planes=choice.planes, lm_head_bits=_HEAD_BITS)
    else:
        config = MPQConfig(bits=int(choice.bits), group_size=choice.group_size, lm_head_bits=_HEAD_BITS)
    with torch.device("meta"):
        shape: Any = LlamaConfig.from_dict({**sizes, "tie_word_embeddings": False, "dtype": torch.bfloat16})
        model = LlamaForCausalLM._from_config(shape).eval()
    plan = plan_layers(model, config)
    entries: dict[str, TableEntry] = {}
    for name, shape_of in plan.selected.items():
        entry = choice.entry(shape_of.in_features)
        assert entry is not None  # one width fits any layer
        entries[name] = entry
    entries |= plan.heads.entries
    for name, entry in entries.items():
        size = plan.selected.get(name) or plan.heads.shapes[name]
        layer: OneBitLinear | MPQLinear
        if entry.method == "mpq":
            groups, symmetric = entry.group_size, entry.symmetric
            layer = MPQLinear(
                size.in_features, size.out_features, size.bias, bits=entry.bits, group_size=groups, symmetric=symmetric
            )
        else:
            layer = OneBitLinear(size.in_features, size.out_features, size.bias, planes=entry.planes)
        for parameter in layer.parameters():
            parameter.__dict__["_is_hf_initialized"] = True  # as Transformers marks what it loaded
        model.set_submodule(name, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = torch.ones if parameter.dim() == 1 else _small_numbers
            tensor = value(tuple(parameter.shape), dtype=parameter.dtype)
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
    config.modules = {name: entry.to_dict() for name, entry in entries.items()}
    attach(model, config)
    checkpoint.save(model, folder)


def _small_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype).normal_(std=0.02)


def _transformers_rival(name: str, model: Any, ids: Tensor, before: int | None) -> ModelRival:
    head = model.get_output_embeddings()
    rival = ModelRival(
        name,
        lambda ids, new_tokens: timed_generation(model, ids, new_tokens),
        lambda ids: _last_logits(model, ids),
        {"linear": _packing_of(model) if name.startswith("packed") else name, "head": _format_of(head)},
        tensor_bytes(model),
        None,
    )
    rival.logits(ids)
    rival.resident = _grown(before)
    return rival


@torch.inference_mode()
def _last_logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, logits_to_keep=1).logits
    return logits[0, -1].float()


def _packing_of(model: Any) -> str:
    """How the linear layers of its blocks are packed."""
    head = model.get_output_embeddings()
    outside = (head, model.get_input_embeddings())
    kinds = {name_of(entry_of(layer)) for layer in packed_layers(model).values() if layer not in outside}
    return f"{', '.join(sorted(kinds))}, packed"


def _format_of(head: Any) -> str:
    """How the weights of an output head are stored."""
    bits = getattr(head, "bits", None)
    return str(head.weight.dtype).replace("torch.", "") if bits is None else f"{bits} bits"


@dataclass(frozen=True)
class Starter:
    """Starts llama.cpp: where files are written, what it will be asked, and who ends its processes."""

    folder: Path
    ids: Tensor
    new_tokens: int
    threads: int
    processes: contextlib.ExitStack

    def __call__(self, path: Path, repack: bool) -> LlamaProcess:
        """A process that has shown that it can run the model."""
        llama = LlamaProcess(path, self.ids.shape[1] + self.new_tokens, self.threads, repack)
        llama.generate(self.ids, 2)
        self.processes.callback(llama.close)
        return llama


def _llama_rivals(
    twin: Any, kinds: Sequence[str], head: str, start: Starter
) -> tuple[list[ModelRival], list[dict[str, str]]]:
    """llama.cpp with the twin's weights in each of some types, and why not; its head is as wide as the packed one."""
    head_type = "q4_0" if head.startswith("4 ") else "f16"
    rivals, skipped = [], []
    try:
        ggml = Ggml()
    except ImportError as error:
        return [], [{"contender": "llama.cpp", "reason": str(error)}]
    for kind in kinds:
        name, path, linear = f"llama.cpp {kind}", start.folder / f"{kind}.gguf", kind
        if reason := gguf_file.obstacle(twin.config, ggml, kind):
            skipped.append({"contender": name, "reason": reason})
            continue
        gguf_file.write(twin, path, ggml, kind, head_type)
        try:
            try:
                llama = start(path, repack=True)
            except RuntimeError as error:  # the AMX layouts of some builds crash
                llama = start(path, repack=False)
                linear += f", weights not repacked: otherwise {error}"
        except (ImportError, RuntimeError) as error:
            skipped.append({"contender": name, "reason": str(error)})
            continue
        about = {"linear": linear, "head": head_type}
        bound = LEAST_COSINE if kind == "f16" else None
        size, used = path.stat().st_size, llama.used_bytes()
        rivals.append(ModelRival(name, llama.generate, llama.logits, about, size, used, bound))
    return rivals, skipped


def _check(rivals: Sequence[ModelRival], ids: Tensor) -> dict[str, float]:
    """Cosines between each rival's logits and the bf16 twin's; empty where there is no twin."""
    expected = next((rival.logits(ids) for rival in rivals if rival.name == "bf16"), None)
    if expected is None:
        return {}
    cosines = {}
    for rival in rivals:
        cosine = float(torch.cosine_similarity(rival.logits(ids), expected, dim=0))
        if rival.least_cosine is not None and not cosine >= rival.least_cosine:
            raise WrongResult(
                f"The logits of {rival.name} are not those of the bf16 model: their cosine is {cosine:.3f}, expected "
                f"at least {rival.least_cosine}. Nothing was timed"
            )
        cosines[rival.name] = cosine
    return cosines


def _agrees(rival: ModelRival, ids: Tensor, folder: str) -> float:
    """The cosine between a packed model's logits and those of its weights in bf16, a model that is dropped again."""
    twin = loading.load(folder, dequantize=True, dtype=torch.bfloat16).eval()
    expected = ModelRival("bf16", rival.generate, lambda ids: _last_logits(twin, ids), {}, 0, None)
    return _check([rival, expected], ids)[rival.name]


def _time(
    rivals: Sequence[ModelRival], ids: Tensor, new_tokens: int, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    times: dict[str, tuple[list[float], list[float]]] = {rival.name: ([], []) for rival in rivals}
    for number in range(-1, rounds):
        first = number % len(rivals)
        for rival in (*rivals[first:], *rivals[:first]):
            prefill, decode = rival.generate(ids, new_tokens)
            if number >= 0:
                times[rival.name][0].append(prefill)
                times[rival.name][1].append(decode)
    return times


def _file_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in checkpoint.weight_files(folder))


def _grown(before: int | None) -> int | None:
    now = resident_bytes()
    # Less than before: what the process still held then has been freed since, and hides what came.
    return None if now is None or before is None or now < before else now - before
