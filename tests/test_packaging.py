"""The wheel: what is in it, what building it needs, and that Optimum finds our command in it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REGISTER = "optimum/commands/register/register_hf_onebit.py"


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """A wheel built from a copy of the tree, since a build leaves files behind; and what pip said."""
    # Nothing that a build in the tree left: setuptools copies what it finds.
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", "build", "*.egg-info", "demo-output", ".*_cache", "*.so", "_cpu_not_built.txt"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-v"]
    done = subprocess.run(
        [*command, "-w", str(folder), str(folder / "tree")],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a machine without a compiler."""
    return build(tmp_path_factory.mktemp("build"), CXX="no-such-compiler")[0]


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_build_needs_neither_torch_nor_a_compiler() -> None:
    names = {r.split(">")[0].split("=")[0].strip() for r in PROJECT["build-system"]["requires"]}
    assert names == {"setuptools"}
    assert PROJECT["build-system"]["build-backend"] == "setuptools.build_meta"


def test_the_wheel_has_the_version_of_the_package(wheel: Path) -> None:
    from hf_onebit.version import __version__

    assert wheel.name.startswith(f"hf_onebit-{__version__}-")


def test_the_wheel_holds_every_module_of_the_package(contents: set[str]) -> None:
    files = [f.relative_to(ROOT) for f in (ROOT / "hf_onebit").rglob("*.py") if "__pycache__" not in f.parts]
    modules = {str(f) for f in files if "optimum_register" not in f.parts}
    assert modules <= contents, f"pyproject.toml does not list the packages of {sorted(modules - contents)}"
    assert {"hf_onebit/py.typed", REGISTER} <= contents
    assert any(name.endswith("licenses/LICENSE") for name in contents)


def test_the_wheel_holds_every_kernel_source(contents: set[str]) -> None:
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / "hf_onebit/ops/csrc").rglob("*") if f.is_file()}
    assert sources <= contents


def test_the_wheel_holds_nothing_else(contents: set[str]) -> None:
    tops = {name.split("/")[0] for name in contents}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"hf_onebit", "optimum"}
    assert {name for name in contents if name.startswith("optimum/")} == {REGISTER}
    assert not [name for name in contents if "/tests/" in name or name.endswith((".txt.gz", ".pyc"))]


RECORD = "hf_onebit/ops/_cpu_not_built.txt"


def recorded(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(RECORD).decode()


def test_without_a_compiler_the_wheel_is_plain_python_and_says_why(wheel: Path, contents: set[str]) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in contents if name.endswith(".so")]
    assert recorded(wheel) == "the C++ compiler no-such-compiler was not found\n"


@pytest.fixture(scope="module")
def wheel_without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of an isolated build: a folder in front of the path hides the installed torch from it."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "hidden").mkdir()
    (folder / "hidden/sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)\n"
    )
    return build(folder / "build", PYTHONPATH=str(folder / "hidden"))[0]


def test_without_torch_the_wheel_is_plain_python_and_says_why(wheel_without_torch: Path) -> None:
    assert wheel_without_torch.name.endswith("-py3-none-any.whl")
    assert recorded(wheel_without_torch) == "torch was not installed where the package was built\n"


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler here")
def test_such_an_install_builds_its_kernels_into_the_cache(wheel_without_torch: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel_without_torch) as archive:
        archive.extractall(tmp_path / "installed")  # a wheel of plain Python is installed by unpacking it
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "HF_ONEBIT_CACHE": str(tmp_path / "cache")}
    environment.pop("HF_ONEBIT_ISA", None)

    def doctor(*arguments: str) -> dict:
        command = [sys.executable, "-m", "hf_onebit.cli", "doctor", "--json", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)
        result = json.loads(done.stdout)
        assert (result["ok"], "without its compiled kernels" in done.stderr) == (True, not in_use(result))
        return result

    def in_use(result: dict) -> bool:
        return result["kernels"]["cpu"].startswith("in use for onebit and mpq layers on the CPU, with ")

    before = doctor()
    assert before["kernels"]["cpu"] == (
        "not in use: torch was not installed where the package was built; build them: hf-onebit doctor --build"
    )
    assert before["built"] is None
    building = doctor("--build")
    (file,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert building["built"] == str(file)
    assert building["build_seconds"] > 0
    after = doctor()
    for result in (building, after):
        assert in_use(result)
        assert result["kernels"]["cpu"].endswith(f", from {file}")
    # Sources that changed since, as by an update of the package, have a place of their own in the cache.
    header = tmp_path / "installed/hf_onebit/ops/csrc/linear.h"
    header.write_text(header.read_text() + "// newer\n")
    assert not in_use(doctor())


def test_the_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "*.egg-info")
    )
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path / "tree",
        env={**os.environ, "CXX": "no-such-compiler"},
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / "hf_onebit/ops/csrc").iterdir()}
    assert sources | {"setup.py", "pyproject.toml", "LICENSE", "hf_onebit/ops/build.py"} <= names


def test_a_failing_compiler_does_not_fail_the_build(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    built, _ = build(tmp_path / "build", CXX=str(compiler))
    with zipfile.ZipFile(built) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        said = archive.read(metadata).decode()
        assert "hf_onebit/__init__.py" in archive.namelist()  # not in a folder for platforms
    assert built.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in said
    assert "Tag: py3-none-any" in said
    assert recorded(built).startswith("compiling failed: ")


@pytest.mark.parametrize("compiler", ["/nonexistent", "false"])
def test_building_in_place_without_a_working_compiler_says_so_and_goes_on(tmp_path: Path, compiler: str) -> None:
    """What `make kernels` runs."""
    shutil.copytree(ROOT / "hf_onebit", tmp_path / "hf_onebit", ignore=shutil.ignore_patterns("__pycache__", "_cpu*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace", "--force"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CXX": compiler},
    )
    said = (tmp_path / RECORD).read_text()
    if compiler == "false":
        assert said.startswith("compiling failed: ")
        assert 'building extension "hf_onebit.ops._cpu" failed' in done.stdout + done.stderr
    else:
        assert said == "the C++ compiler /nonexistent was not found\n"
        assert f"the CPU kernels are not compiled: {said.strip()}" in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler here")
def test_with_torch_and_a_compiler_the_wheel_has_one_binary_for_all_pythons(tmp_path: Path) -> None:
    built, _ = build(tmp_path / "build")
    assert "-cp310-abi3-" in built.name
    with zipfile.ZipFile(built) as archive:
        binaries = [name for name in archive.namelist() if name.endswith(".so")]
        assert binaries == ["hf_onebit/ops/_cpu.abi3.so"]
        assert RECORD not in archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    code = "import hf_onebit, hf_onebit.ops as o; print(hf_onebit.__file__); print(o.cpu.status())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked"), "HF_ONEBIT_ISA": "scalar"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    where, status = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert status.startswith("in use for onebit and mpq layers on the CPU, with scalar")


def test_optimum_finds_the_command_in_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quantization_base", reason="optimum is not installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)  # a wheel of plain Python is installed by unpacking it
    script = (
        "import sys\n"
        # Without the package under test, which may be installed in editable mode and would be found as well.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "sys.path[:] = [p for p in sys.path if '__editable__' not in p]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from optimum.commands import optimum_cli\n"
        "assert 'torch' not in sys.modules and 'hf_onebit' not in sys.modules\n"
        "(command, parent), = optimum_cli.load_optimum_namespace_cli_commands()\n"
        "assert command.__name__ == 'OneBitCommand' and parent is None\n"
        "assert 'hf_onebit' not in sys.modules, 'the register file must stay light'\n"
        # Stand in for the command line: what reaches it is what was typed, options and --help included.
        "import types\n"
        "sys.modules['hf_onebit'] = types.ModuleType('hf_onebit')\n"
        "cli = sys.modules['hf_onebit.cli'] = types.ModuleType('hf_onebit.cli')\n"
        "cli.main = lambda words: print(*words) or 7\n"
        "sys.argv = ['optimum-cli', 'onebit', 'quantize', '-o', 'out', 'model', '--planes', '2', '--help']\n"
        "optimum_cli.main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert result.returncode == 7, result.stderr
    assert result.stdout.split() == ["quantize", "-o", "out", "model", "--planes", "2", "--help"]


def test_our_quantizer_is_one_of_optimums() -> None:
    base = pytest.importorskip("optimum.quantization_base", reason="optimum is not installed")
    from hf_onebit.integrations.optimum import OneBitQuantizer

    assert issubclass(OneBitQuantizer, base.OptimumQuantizer)
    for name in ("from_pretrained", "quantize"):
        assert callable(getattr(OneBitQuantizer, name)), f"Optimum's interface has {name}"


def test_every_extra_is_documented() -> None:
    table = QUICKSTART.partition("| extra | what for |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(PROJECT["project"]["optional-dependencies"])
