"""Finding compiled kernels: in the package, else in the user's cache; never what somebody else may have put there."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hf_onebit import cli, ops
from hf_onebit.ops import build, cpu, kernel_cache, reference

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no compiled kernels for Windows")
WARNING = "hf_onebit runs packed layers on the CPU without its compiled kernels"
ARGUMENTS = (torch.ones(1, 3), torch.ones(1, 2, dtype=torch.int32), torch.ones(2), torch.ones(3))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_ONEBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_ONEBIT_ISA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The loader as it starts, in a package folder without a binary; nothing can really be loaded a second time."""
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(cpu, "_FOLDER", package)
    for name, value in {"_library": None, "_origin": None, "_refused": "", "_warned": False}.items():
        monkeypatch.setattr(cpu, name, value)
    return package


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling that takes no time: the file holds what the loader looks for, and is no library."""
    monkeypatch.setattr(build, "obstacle", lambda: None)
    monkeypatch.setattr(build, "compile_binary", lambda target: target.write_text(build.embedded()))


# --- where -------------------------------------------------------------------------------------------------------


def test_the_cache_is_where_the_platform_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    assert kernel_cache.folder() == cache
    monkeypatch.delenv("HF_ONEBIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernel_cache.folder() == tmp_path / "xdg" / "hf_onebit"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert kernel_cache.folder() == tmp_path / ".cache" / "hf_onebit"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kernel_cache.folder() == tmp_path / "Library" / "Caches" / "hf_onebit"
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert kernel_cache.folder() is None
    assert kernel_cache.binary() is None


def test_the_key_names_sources_abi_and_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = kernel_cache.binary()
    assert file is not None
    assert file.name == "_cpu.abi3.so"
    assert file.parent.name.startswith(f"{build.source_hash()}-torch2.10-")
    monkeypatch.setattr(build, "FLAGS", ("-O0",))
    assert kernel_cache.binary() != file
    monkeypatch.setattr(build, "CSRC", tmp_path / "none")
    assert kernel_cache.binary() is None


# --- building ----------------------------------------------------------------------------------------------------


def test_building_leaves_one_file_that_only_its_owner_can_write(compiles: None, cache: Path) -> None:
    before = os.umask(0)
    try:
        file, seconds = kernel_cache.build_binary()
    finally:
        os.umask(before)
    assert file == kernel_cache.binary()
    assert seconds >= 0
    assert file.read_text() == build.embedded()
    assert [path for path in cache.rglob("*") if path.is_file()] == [file]
    for path in (file, file.parent, cache):
        assert path.stat().st_mode & 0o077 == 0
    assert kernel_cache.distrust(file) == ""


def test_a_failed_build_leaves_what_was_there(
    compiles: None, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, _ = kernel_cache.build_binary()
    monkeypatch.undo()
    monkeypatch.setenv("HF_ONEBIT_CACHE", str(cache))
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho half > half.so\necho no such instruction >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -flag")
    with pytest.raises(RuntimeError, match=r"(?s)failed, with status 3 of.*-flag.*no such instruction") as caught:
        kernel_cache.build_binary()
    assert all(flag in str(caught.value) for flag in build.FLAGS)
    assert [path for path in cache.rglob("*") if path.is_file()] == [file]


def test_no_compiler_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(RuntimeError, match=r"the C\+\+ compiler /nonexistent was not found; install g\+\+ or clang"):
        kernel_cache.build_binary()
    assert not cache.exists()


def test_a_compiler_that_is_there_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python may have been built with a compiler that this machine lacks."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.sysconfig, "get_config_var", lambda name: "/conda/bin/cross-c++ -pthread")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compiler() == ["/conda/bin/cross-c++", "-pthread"]
    (tmp_path / "clang++").touch(mode=0o755)
    assert build.compiler() == ["clang++"]


def test_a_folder_that_cannot_be_written_is_said(
    compiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_ONEBIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match="set HF_ONEBIT_CACHE to another folder"):
        kernel_cache.build_binary()


# --- trust -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("level", [-1, 0, 1, 2])
def test_what_others_can_write_is_refused(compiles: None, unloaded: Path, level: int, mode: int) -> None:
    file, _ = kernel_cache.build_binary()
    path = file if level < 0 else file.parents[level]
    path.chmod(mode)
    reason = f"others can write to {path}; take that away: chmod go-w {path}"
    assert kernel_cache.distrust(file) == reason
    assert cpu.load() == f"the kernels were not built; in the cache: {reason}"
    assert cpu.status().startswith(f"not in use: the kernels were not built; in the cache: {reason}; ")
    if level >= 0:
        with pytest.raises(RuntimeError, match="not built where others could change them: others can write to"):
            kernel_cache.build_binary()


def test_a_folder_like_tmp_is_good_enough_on_the_way(compiles: None) -> None:
    file, _ = kernel_cache.build_binary()
    file.parents[1].chmod(0o1777)
    assert kernel_cache.distrust(file) == ""


def test_what_belongs_to_others_is_refused(compiles: None, unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = kernel_cache.build_binary()
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    if mine == 0:  # root's own files are trusted by all
        assert kernel_cache.distrust(file) == ""
        os.chown(file.parents[1], 12345, -1)
        assert kernel_cache.distrust(file) == f"{file.parents[1]} belongs to user 12345, not to you"
        assert "belongs to user 12345" in cpu.load()
    else:
        assert kernel_cache.distrust(file) == f"{file} belongs to user {mine}, not to you"
        assert f"belongs to user {mine}" in cpu.load()


def test_symbolic_links_are_followed_before_anything_is_examined(
    compiles: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = kernel_cache.build_binary()
    elsewhere = tmp_path / "elsewhere"
    shutil.move(file.parent, elsewhere)
    file.parent.symlink_to(elsewhere)
    assert kernel_cache.distrust(file) == ""
    elsewhere.chmod(0o777)
    assert kernel_cache.distrust(file).startswith(f"others can write to {elsewhere}")
    file.parent.unlink()
    file.parent.symlink_to(file.parent)
    assert "cannot be examined" in kernel_cache.distrust(file)


# --- loading -----------------------------------------------------------------------------------------------------


def test_a_missing_binary_is_explained(unloaded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "obstacle", lambda: None)
    assert cpu.load() == "the kernels were not built"
    assert cpu.status() == "not in use: the kernels were not built; build them: hf-onebit doctor --build"
    (unloaded / "_cpu_not_built.txt").write_text("torch was not there\n")
    assert cpu.load() == "torch was not there"
    monkeypatch.setattr(build, "obstacle", lambda: "the C++ compiler c++ was not found")
    assert cpu.status() == (
        "not in use: torch was not there; install g++ or clang++ (on Debian: apt install g++), or set CXX to one, then "
        "build them: hf-onebit doctor --build"
    )
    monkeypatch.setattr(build, "obstacle", lambda: "the torch of the build has no stable ABI headers")
    assert cpu.build_command() == "install torch 2.10 or newer, then build them: hf-onebit doctor --build"
    monkeypatch.setattr(build, "CSRC", tmp_path / "none")
    assert cpu.build_command().endswith("build them: python -m pip install --no-build-isolation --no-deps "
                                        "--force-reinstall --no-binary :all: hf_onebit")  # fmt: skip


def test_a_binary_of_other_sources_is_refused(unloaded: Path, compiles: None) -> None:
    (unloaded / build.BINARY).write_text("hf_onebit sources 0123")
    stale = "_cpu.abi3.so was built from other sources than those that are installed"
    assert cpu.load() == stale
    file, _ = kernel_cache.build_binary()
    file.write_text("hf_onebit sources 0123")
    assert cpu.load() == f"{stale}; in the cache: {stale}"


def test_a_file_that_is_no_library_is_refused(unloaded: Path, compiles: None) -> None:
    kernel_cache.build_binary()
    assert "in the cache: _cpu.abi3.so does not load with torch" in cpu.load()


@pytest.mark.skipif(cpu.isa() is None, reason=f"no compiled CPU kernels: {cpu.status()}")
def test_the_package_comes_first_then_the_cache(
    unloaded: Path, compiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    class Library:
        def __init__(self, path: str) -> None:
            loaded.append(path)
            self.hf_onebit_isa = lambda: b"scalar"
            self.hf_onebit_isas = lambda: b"scalar"
            self.hf_onebit_activations = lambda: b"exact"
            self.hf_onebit_tile_rows = lambda *_: 0
            self.hf_onebit_select_tile_rows = lambda _: None

    monkeypatch.setattr(cpu.ctypes, "CDLL", Library)
    file, _ = kernel_cache.build_binary()
    assert cpu.load() == ""
    assert loaded == [str(file.resolve())]
    assert (
        cpu.status() == f"in use for onebit and mpq layers on the CPU, with scalar (of scalar), from {file.resolve()}"
    )
    monkeypatch.setattr(cpu, "_library", None)
    (unloaded / build.BINARY).write_text(build.embedded())
    assert cpu.load() == ""
    assert loaded[1] == str(unloaded / build.BINARY)
    assert cpu.status().endswith("(of scalar)")


# --- the warning -------------------------------------------------------------------------------------------------


def test_the_reference_warns_once_and_names_the_command(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "obstacle", lambda: None)
    cpu.load()
    message = rf"{WARNING}, .* \(the kernels were not built\); build them: hf-onebit doctor --build"
    with pytest.warns(UserWarning, match=message):
        reference.onebit_linear(*ARGUMENTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.onebit_linear(*ARGUMENTS)


@pytest.mark.parametrize("why", ["off", "loaded", "float64", "tracing"])
def test_the_reference_does_not_warn(why: str, unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "off":
        monkeypatch.setenv("HF_ONEBIT_ISA", "off")
    cpu.load()
    if why == "loaded":
        monkeypatch.setattr(cpu, "_library", object())
    if why == "tracing":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, *rest = ARGUMENTS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.onebit_linear(x.double() if why == "float64" else x, *rest)
    assert not cpu._warned


def test_compiling_a_model_does_not_warn(unloaded: Path) -> None:
    """Tracing calls the fake; the model that was compiled may warn when it runs."""
    cpu.load()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.onebit_linear(*(mode.from_tensor(tensor) for tensor in ARGUMENTS))
    assert not cpu._warned


# --- hf-onebit doctor --------------------------------------------------------------------------------------------


def test_doctor_does_not_build_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    monkeypatch.setattr(cpu, "isa", lambda: "scalar")
    monkeypatch.setattr(build, "compile_binary", lambda target: pytest.fail("compiled"))
    assert cli.main(["doctor", "--build"]) == 0
    assert "in use already: nothing was compiled" in capsys.readouterr().out
    assert not cache.exists()


def test_doctor_says_when_it_built_in_vain(
    unloaded: Path, compiles: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["doctor", "--build"]) == 1
    assert "but it is not in use: the kernels were not built; in the cache: _cpu" in capsys.readouterr().err
    monkeypatch.setenv("HF_ONEBIT_ISA", "off")
    assert cli.main(["doctor", "--build", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["built"] == str(kernel_cache.binary())
    assert result["build_seconds"] >= 0
    assert result["kernels"]["cpu"] == "not in use: HF_ONEBIT_ISA=off"


def test_nothing_is_compiled_at_import(tmp_path: Path, cache: Path) -> None:
    """A tree without a binary, and a compiler that leaves a trace."""
    root = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_cpu_not_built.txt")
    shutil.copytree(Path(ops.__file__).parents[1], root / "hf_onebit", ignore=ignored)
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "PYTHONPATH": str(root)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hf_onebit.cli", "doctor", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)

    done = run()
    assert done.returncode == 0, done.stderr
    assert "the kernels were not built; build them: hf-onebit doctor --build" in done.stdout
    assert done.stderr.count(WARNING) == 1
    assert not (tmp_path / "called").exists()
    assert not cache.exists()
    failed = run("--build")
    assert failed.returncode == 1
    assert "hf-onebit: error: Compiling the CPU kernels failed" in failed.stderr
    assert (tmp_path / "called").exists()
