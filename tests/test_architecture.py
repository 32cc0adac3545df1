"""The plan of the house, enforced over the syntax trees: who may import whom (docs/design.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_onebit"
FILES = sorted(PACKAGE.rglob("*.py"))

# Small leaves that know no quantization: anyone may use them.
LEAVES = {"version", "_errors"}
CONDUCTORS = {
    "quantize",
    "checkpoint",
    "headers",
    "verification",
    "loading",
    "weights",
    "planning",
    "records",
    "mpq_quantizer",
    "interchange",
    "dry_run",
    "streaming",
    "disk_model",
}  # one level: they may import each other
# What the command line calls, one file a command.
COMMANDS = {"inspection", "doctor", "demo", "bench"}
LIBRARY = {"config", "calibration", "walk", "prefix", "ladder", "distillation", "evaluation", "report", "progress"}
LIBRARY |= {"tuning", "layer_errors", "self_text", "self_cache", "preflight", "sensitivity", "budget"}
LIBRARY |= {"scale_files", "repacking", "fitting", "group_fitting", "group_tensors", "mpq_config"}
LIBRARY |= {"choices", "auto_bits", "auto_sensitivity", "mixed_fitting"}
LIBRARY |= {"algorithms", "nn", "formats", "resume", "states", "starved", "recipes", "upper_rungs"}
LIBRARY |= {"ranks", "tensor_files"}
# What the modules of each kind may import of the package, besides their own folder and the leaves.
MAY_IMPORT = {
    "formats": set(),
    "algorithms": set(),
    "config": {"formats"},  # the limits of a format are stated once, where its bytes are
    "choices": {"algorithms", "formats"},
    "mpq_config": {"config", "choices", "algorithms", "formats"},
    "progress": set(),
    "evaluation": set(),
    "report": set(),
    "calibration": {"progress"},
    "self_text": {"progress"},
    "self_cache": {"self_text", "calibration", "progress", "ops.kernel_cache"},  # one cache folder for everything
    "preflight": {"config", "calibration", "walk", "progress", "algorithms", "nn", "formats"},
    "resume": {"progress"},
    "states": set(),
    "starved": set(),
    "ranks": set(),
    "tensor_files": set(),
    "walk": {"calibration", "states", "starved", "ranks"},
    "layer_errors": {"calibration", "nn"},
    "prefix": {"calibration", "walk", "states", "starved", "ranks"},
    "tuning": {"prefix", "algorithms"},
    "recipes": {"algorithms"},
    "fitting": {"prefix", "algorithms"},
    "group_tensors": {"algorithms", "formats"},
    "group_fitting": {"fitting", "prefix", "tuning", "group_tensors", "algorithms", "formats"},
    "mixed_fitting": {"fitting", "group_fitting", "ladder", "prefix", "tuning", "algorithms", "formats"},
    "auto_sensitivity": {"calibration", "choices", "sensitivity", "group_tensors", "algorithms", "nn", "formats"},
    "auto_bits": {"config", "mpq_config", "choices", "budget", "auto_sensitivity", "sensitivity"}
    | {"algorithms", "nn", "formats"},
    "ladder": {"calibration", "fitting", "prefix", "tuning", "recipes", "resume", "ranks"}
    | {"algorithms", "nn", "formats"},
    "upper_rungs": {"calibration", "distillation", "recipes", "resume", "algorithms", "formats"},
    "distillation": {"group_tensors", "algorithms", "nn", "formats"},
    "sensitivity": {"calibration", "walk", "algorithms", "nn"},
    "scale_files": {"nn"},
    "repacking": {"algorithms", "nn", "formats"},
    "budget": {"config", "sensitivity", "algorithms", "nn", "formats"},
    "ops": {"formats"},
    "nn": {"ops", "formats", "algorithms.update", "algorithms.counter_random", "algorithms.moments"},
    "training": {"nn", "algorithms"},
    "quantize": LIBRARY | CONDUCTORS,
    "mpq_quantizer": LIBRARY | CONDUCTORS,
    "dry_run": LIBRARY | CONDUCTORS,
    "streaming": LIBRARY | CONDUCTORS,
    "disk_model": LIBRARY | CONDUCTORS,
    "checkpoint": LIBRARY | CONDUCTORS,
    "headers": {"config", "formats"},
    "planning": {"config", "mpq_config", "progress", "nn", "formats"},
    "records": {"config", "calibration", "evaluation", "report", "progress", "nn", "formats"},
    "weights": {"config", "group_tensors", "algorithms", "formats"},
    "verification": LIBRARY | CONDUCTORS,
    "loading": LIBRARY | CONDUCTORS,
    "integrations": {"config", "mpq_config", "training", "nn", "formats", "algorithms", "progress"}
    | {"repacking"}
    | CONDUCTORS,
    "integrations.optimum_register": {"cli"},  # the entry point of another command line
    "integrations.vllm_layers": {"ops", "formats"},  # layers of another library, computed by our operators
    "interchange": LIBRARY | CONDUCTORS,
    "inspection": LIBRARY | CONDUCTORS,
    "doctor": LIBRARY | CONDUCTORS | {"ops", "integrations"},  # it asks the kernels how they are
    "demo": LIBRARY | CONDUCTORS | {"inspection"},
    "bench": LIBRARY | CONDUCTORS | {"ops"},  # it times the operators themselves
    "cli": LIBRARY | CONDUCTORS | COMMANDS | {"ops", "training", "integrations", ""},
    "__main__": {"cli"},
    "__init__": LIBRARY | CONDUCTORS | {"training", "integrations"},  # the door
    **{name: set() for name in LEAVES},
}
# Only these files import these libraries; with a star, only inside functions.
OWNERS = {
    "triton": {"ops/triton_kernels.py", "ops/triton_update.py", "ops/triton_experts.py"},
    "peft": {"integrations/peft.py"},
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
    refused = sorted(n for n in ours if not is_allowed(n, own))
    assert not refused, f"{ids(file)} may not import {refused}; allowed: {sorted(MAY_IMPORT[own])}"


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
