"""The plan of the house, enforced over the syntax trees: who may import whom (docs/design.md)."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_onebit"
FILES = sorted(PACKAGE.rglob("*.py"))

# Small leaves that know no quantization: anyone may use them.
LEAVES = {"version", "arithmetic", "_errors", "byte_sizes", "durations", "free_memory", "modes", "casting"}
LEAVES |= {"counts", "disk_space", "digests", "argument_checks"}
# One level: they may import each other.
CONDUCTORS = {
    "quantize",
    "quantizer",
    "conducting",
    "mpq_quantizer",
    "dry_run",
    "streaming",
    "loading",
    "quantization",
    "storage",
    "interchange",
}
# What the commands call, where one computes something of its own.
COMMANDS = {"inspection", "doctor", "demo", "bench"}
LIBRARY = {"config", "config_checks", "mpq_config", "choices", "calibration", "texts", "rungs", "bits", "distillation"}
LIBRARY |= {"preflight", "sources", "evaluation", "report", "progress", "ranks", "algorithms", "nn", "formats"}
LIBRARY |= {"head_split"}
# What the modules of each kind may import of the package, besides their own folder and the leaves.
MAY_IMPORT = {
    "formats": set(),
    "algorithms": set(),
    "config_checks": {"formats"},  # the limits of a format are stated once, where its bytes are
    "config": {"config_checks", "formats"},
    "choices": {"algorithms", "formats"},
    "mpq_config": {"config", "config_checks", "choices", "algorithms", "formats"},
    "progress": set(),
    "sources": set(),
    "ranks": set(),
    "evaluation": set(),
    "report": set(),
    "calibration": {"config"},
    "texts": {"calibration", "progress", "ops.kernel_cache"},  # one cache folder for everything
    "preflight": {"config", "calibration", "rungs.blocks", "rungs.block_calls", "rungs.sequences", "rungs.recipes"}
    | {"head_split", "progress"}
    | {"algorithms", "nn", "formats"},
    "head_split": {"algorithms"},
    "distillation": {"head_split", "quantization.group_tensors", "algorithms", "nn", "formats"},
    "rungs": {"calibration", "distillation", "progress", "ranks", "algorithms", "nn", "formats"}
    | {"quantization.group_tensors", "quantization.resume"},
    "bits": {"config", "mpq_config", "choices", "calibration", "rungs.blocks", "rungs.walk", "algorithms"}
    | {"nn", "formats", "quantization.group_tensors"},
    "quantization": {"config", "mpq_config", "calibration", "evaluation", "report", "progress"}
    | {"algorithms", "nn", "formats"},
    "storage": {"config", "mpq_config", "quantization.resume", "report", "nn", "formats", "progress"},
    "ops": {"formats"},
    "nn": {"ops", "formats", "algorithms.update", "algorithms.counter_random", "algorithms.moments"},
    "training": {"nn", "algorithms"},
    "conducting": {"config", "calibration", "texts", "rungs", "preflight", "sources", "loading", "quantization"}
    | {"progress", "ranks", "nn", "formats"},
    "quantize": LIBRARY | CONDUCTORS,
    "quantizer": LIBRARY | CONDUCTORS,
    "mpq_quantizer": LIBRARY | CONDUCTORS,
    "dry_run": LIBRARY | CONDUCTORS,
    "streaming": LIBRARY | CONDUCTORS,
    "loading": LIBRARY | CONDUCTORS,
    "interchange": LIBRARY | CONDUCTORS,
    "integrations": {"config", "mpq_config", "training", "nn", "formats", "algorithms", "progress"} | CONDUCTORS,
    "integrations.optimum_register": {"cli"},  # the entry point of another command line
    "integrations.vllm_layers": {"ops", "formats"},  # layers of another library, computed by our operators
    "inspection": LIBRARY | CONDUCTORS,
    "doctor": LIBRARY | CONDUCTORS | {"ops", "integrations"},  # it asks the kernels how they are
    "demo": LIBRARY | CONDUCTORS | {"inspection"},
    "bench": LIBRARY | CONDUCTORS | {"ops"},  # it times the operators themselves
    "commands": LIBRARY | CONDUCTORS | COMMANDS,
    "cli": {"commands", "report"},
    "__main__": {"cli"},
    "__init__": LIBRARY | CONDUCTORS | {"training", "integrations"},  # the door
    **{name: set() for name in LEAVES},
}
# Rooms in which each file stands above those named before it, and imports no other of them.
STANDING = {
    "rungs": ["states", "starved", "recipes", "sequences", "blocks", "hessian_sums", "block_calls", "walk", "prefix"]
    + ["fitting", "tuning", "group_fitting", "ladder", "mixed_fitting", "upper_rungs"],
    "streaming": ["disk_model", "output", "block_errors", "run"],
    "bits": ["sensitivity", "budget", "auto_sensitivity", "auto_bits", "attribution", "trials", "selection"],
    "texts": ["openings", "model_states", "self_text", "self_time", "self_cache"],
    "quantization": ["finite", "resume", "group_tensors", "layer_errors", "repacking", "planning", "records"]
    + ["weights"],
    "conducting": ["method", "fingerprints", "calibrating", "packing", "installing"]
    + ["restoring", "in_memory", "low_memory"],
    "commands": ["options", "printing", "quantize", "evaluate", "inspect", "verify", "bench", "doctor", "report"]
    + ["import_checkpoint", "export_gguf", "demo"],
    "preflight": ["sizes", "timing", "estimates"],
    "evaluation": ["windows", "running", "quality", "speed", "memory"],
    "storage": ["exchange", "tensor_files", "scale_files", "headers", "checkpoint", "shards", "verification"],
}
# Only these files import these libraries; with a star, only inside functions.
OWNERS = {
    "triton": {
        *("ops/triton_kernels.py", "ops/triton_few_rows.py", "ops/triton_update.py", "ops/triton_experts.py"),
        *("ops/triton_indexed.py", "ops/triton_pack.py"),
        "*bench/cuda_clock.py",
    },
    "peft": {"integrations/peft.py", "integrations/peft_experts.py"},
    "optimum": {"integrations/optimum.py", "integrations/optimum_register/register_hf_onebit.py"},
    "gguf": {
        *("*loading.py", "*bench/gguf_file.py", "*interchange/gguf_file.py", "*interchange/gguf_models.py"),
        "*interchange/gguf_vocabulary.py",
    },
    "matplotlib": {"*report/plots.py"},
    "datasets": {"*calibration.py", "*cli.py", "*demo.py"},
    "llama_cpp": {"*bench/llama.py"},
    "vllm": {"*integrations/vllm.py"},
}
TORCH_ONLY = ("formats", "ops", "algorithms")
FORBIDDEN_NAMES = {"utils", "helpers", "core", "engine", "manager"}


def kind(file: Path) -> str:
    """The row of MAY_IMPORT that a file belongs to."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    long = ".".join(parts[:2])
    return long if long in MAY_IMPORT else parts[0]


def imports(file: Path, root: Path = PACKAGE) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, at module level?) of each thing that a file of the package imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    here = ["hf_onebit", *file.relative_to(root).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in inside


def is_allowed(name: str, own: str) -> bool:
    """Whether a file of kind `own` may import hf_onebit.`name`; the empty name is the package itself."""
    allowed = MAY_IMPORT[own] | LEAVES | {own.partition(".")[0]}
    return name in allowed or any(name.startswith(f"{a}.") for a in allowed if a)


def ids(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_only_go_down(file: Path) -> None:
    own = kind(file)
    assert own in MAY_IMPORT, f"{ids(file)} has no place in the plan: add a row to MAY_IMPORT and to docs/design.md"
    ours = [n.partition(".")[2] for n, _ in imports(file) if n.split(".")[0] == "hf_onebit"]
    standing = STANDING.get(file.parent.name, []) if file.stem != "__init__" else []
    assert not standing or file.stem in standing, f"{ids(file)} has no place in its room: add it to STANDING"
    below = standing[: standing.index(file.stem)] if standing else []
    refused = sorted(n for n in ours if not is_allowed(n, own))
    refused += sorted(n for n in ours if standing and n.startswith(f"{own}.") and n.split(".")[1] not in below)
    assert not refused, f"{ids(file)} may not import {refused}; allowed: {sorted(MAY_IMPORT[own])}"


def test_no_import_goes_in_a_circle() -> None:
    """Not for types and not within functions either."""
    modules = {".".join(("hf_onebit", *f.relative_to(PACKAGE).with_suffix("").parts)): f for f in FILES}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}

    def module_of(name: str) -> str:
        while name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph = {
        module: {module_of(name) for name, _ in imports(file) if name.split(".")[0] == "hf_onebit"} - {module}
        for module, file in modules.items()
    }
    assert graph["hf_onebit.mpq_quantizer"] >= {"hf_onebit.quantizer", "hf_onebit.config"}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the files


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_optional_libraries_stay_in_their_files(file: Path) -> None:
    for name, at_top in imports(file):
        library = name.split(".")[0]
        if library in OWNERS:
            owned = ids(file) in OWNERS[library]
            inside = f"*{ids(file)}" in OWNERS[library] and not at_top
            assert owned or inside, f"{ids(file)} imports {library}; only {sorted(OWNERS[library])} may"
        if library in {"transformers", "accelerate"}:
            assert kind(file) not in TORCH_ONLY, f"{ids(file)} imports {library}; only torch is allowed there"
            # nn turns GPT-2's Conv1D back into one on request, and asks for the class only then.
            assert kind(file) != "nn" or not at_top, f"{ids(file)} imports {library} outside a function"


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_device_is_asked_only_in_ops(file: Path) -> None:
    if kind(file) == "ops":
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            assert not any(s.endswith("device.type") for s in sides), f"{ids(file)}:{node.lineno} asks the device"


def test_no_file_is_named_after_nothing() -> None:
    bad = [ids(f) for f in PACKAGE.rglob("*") if f.stem.strip("_") in FORBIDDEN_NAMES]
    assert not bad, f"say what is in these: {bad}"


def test_the_check_itself_sees_every_form_of_import(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    file = tmp_path / "ops" / "cpu.py"
    file.write_text(
        "from . import schema\nfrom ..nn.linear import x\nimport hf_onebit.quantize\ndef f():\n    import peft.tuners\n"
    )
    found = dict(imports(file, tmp_path))
    assert found == {
        "hf_onebit.ops.schema": True,
        "hf_onebit.nn.linear.x": True,
        "hf_onebit.quantize": True,
        "peft.tuners": False,
    }
    assert is_allowed("ops.schema", "ops")
    assert is_allowed("formats", "ops")
    assert not is_allowed("nn.linear.x", "ops")
    assert not is_allowed("quantize", "ops")
    assert not is_allowed("formatsx", "ops")
