"""Quantizing block by block from files: the same files as quantizing whole, in a fraction of the memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import save_float, tiny_gpt2, tiny_ids, tiny_llama, tiny_qwen3_moe, tiny_t5, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer, cli, loading
from hf_onebit.algorithms.blockwise import BlockOptions
from hf_onebit.free_memory import available_memory
from hf_onebit.preflight import estimates
from hf_onebit.quantization.planning import plan_layers
from hf_onebit.quantization.resume import WorkFolder
from hf_onebit.quantizer import Quantizer
from hf_onebit.rungs.recipes import MPQ_RECIPES, RECIPES, Recipe
from hf_onebit.storage import checkpoint
from hf_onebit.storage.tensor_files import stored_tensors
from hf_onebit.streaming.disk_model import DiskModel

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "larger_than_memory.py"
ROWS = [{"input_ids": tiny_ids(1, 24 + 8 * (i % 2), seed=i)} for i in range(6)]
SMALL = {"rounds": 1, "prefix_tokens": 192, "heldout_tokens": 32, "steps": 0, "lengths": (32,)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    tuned = BlockOptions(epochs=1, learning_rate=0.003, sign_rate=0.003)
    monkeypatch.setitem(RECIPES, "fast", Recipe(**SMALL, block=tuned))
    monkeypatch.setitem(MPQ_RECIPES, "fast", Recipe(**SMALL))


def llama(**more):
    return tiny_llama(hidden=32, intermediate=64, heads=2, kv_heads=1, **more)


def quantize(source, folder, low_memory, method="onebit", **options):
    cls: type[Quantizer] = MPQQuantizer if method == "mpq" else OneBitQuantizer
    quantizer = cls.from_pretrained(source, low_memory=low_memory, **options)
    model = quantizer.quantize(folder, max_shard_size="60KB")
    return model, quantizer.report


def contents(folder):
    tensors = {n: t for file in checkpoint.weight_files(folder) for n, t in checkpoint.tensors_of(file)}
    return tensors, json.loads((folder / "config.json").read_text())


def same_files(one, other):
    (tensors, config), (expected, wanted) = contents(one), contents(other)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert config == wanted
    names = {path.name for path in one.iterdir()}
    different = names ^ {path.name for path in other.iterdir()}
    assert all(name.startswith("model-") for name in different), different  # shards may be split elsewhere


CASES = {
    "closed": (llama, {}),
    "tied": (lambda: llama(tied=True), {"planes": 2}),
    "head": (llama, {"dataset": ROWS, "lm_head_bits": 4, "embedding_bits": 8}),
    "tied head": (lambda: llama(tied=True), {"dataset": ROWS, "lm_head_bits": 4, "embedding_bits": 4}),
    "untied head": (lambda: llama(tied=True, bias=True), {"lm_head_bits": 8}),
    "untied embedding": (lambda: llama(tied=True), {"embedding_bits": 8}),
    "gpt2": (tiny_gpt2, {"method": "mpq", "bits": 4, "dataset": ROWS, "double_quant": True}),
    "experts": (lambda: tiny_qwen3_moe(experts=3), {"method": "mpq", "bits": 4, "search": "min-max"}),
    "signs": (lambda: llama(bias=True), {"preset": "fast", "dataset": ROWS, "lm_head_bits": 8}),
    "codes": (llama, {"preset": "fast", "dataset": ROWS, "method": "mpq", "bits": 3, "group_size": 32}),
    "all layers": (llama, {"preset": "fast", "dataset": ROWS, "modules_to_not_convert": []}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_files_are_those_of_quantizing_whole(name, tmp_path):
    make, options = CASES[name]
    source = save_float(make(), tmp_path / "float", tiny_tokenizer())
    _, whole = quantize(source, tmp_path / "whole", False, **options)
    model, report = quantize(source, tmp_path / "streamed", True, **options)
    same_files(tmp_path / "streamed", tmp_path / "whole")
    assert report.keys() == whole.keys()
    assert report["layers"].keys() == whole["layers"].keys()
    for kind in ("layers", "embeddings"):
        for layer, record in whole[kind].items():
            found = report[kind][layer]
            assert found.keys() == record.keys(), layer
            for key, value in record.items():
                if key != "seconds":
                    assert found[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key
    ran = ("method", "planes", "bits", "head", "untied", "coverage", "float_bytes", "total_weights", "output_errors")
    assert [report[key] for key in ran] == [whole[key] for key in ran]
    assert report["fit"] == whole["fit"] or name in ("signs", "codes", "all layers")
    if whole["fit"] is not None:
        assert report["fit"]["blocks"] == whole["fit"]["blocks"]
        assert report["fit"]["drift"] == whole["fit"]["drift"]
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loading.load(tmp_path / "whole")(ids).logits)
    assert not list(tmp_path.glob(".*"))  # neither work nor halves are left


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_a_model_in_files_computes_what_it_does_in_memory(name, float_dir):
    folder = float_dir(tiny.CAUSAL[name]())
    disk = DiskModel(folder)
    plan_layers(disk.model, OneBitConfig())
    disk.open()
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.equal(disk.model(ids).logits, expected)
    present = [n for n, p in disk.model.named_parameters() if not p.is_meta and p.dim() > 1]
    inside = [n for n in present if any(n.startswith(f"{block}.") for block in disk.blocks)]
    assert not inside or len({".".join(n.split(".")[:3]) for n in inside}) == 1  # of one block
    disk.release()
    assert not [n for n, p in disk.model.named_parameters() if not p.is_meta and p.dim() > 1]
    own = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    if name != "qwen3-moe":  # whose experts have other names in memory
        assert all(torch.equal(own[n], tensor) for n, tensor in disk.tensors() if n in own)
    disk.close()


def test_one_block_is_read_at_a_time(float_dir, monkeypatch):
    folder = float_dir(llama(layers=4))
    held, hold = [], DiskModel.hold

    def watched(self, module):
        hold(self, module)
        held.append(sum(p.numel() for p in self.model.parameters() if not p.is_meta and p.dim() > 1))

    monkeypatch.setattr(DiskModel, "hold", watched)
    quantize(folder, folder.parent / "out", True, preset="fast", dataset=ROWS)
    model = llama(layers=4)
    block = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() > 1)
    outside = 2 * model.lm_head.weight.numel()
    assert max(held) <= max(block, outside)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    source = save_float(llama(layers=3), tmp_path / "float")
    quantize(source, tmp_path / "whole", True, preset="fast", dataset=ROWS)
    keep, kept = WorkFolder.save, []

    def once(self, *state):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(keep(self, *state))
        return True

    monkeypatch.setattr(WorkFolder, "save", once)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", True, preset="fast", dataset=ROWS)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.work").is_dir()
    monkeypatch.setattr(WorkFolder, "save", lambda self, *state: kept.append(keep(self, *state)) or True)
    quantize(source, tmp_path / "out", True, preset="fast", dataset=ROWS)
    assert len(kept) == 3  # the last block is all that was missing
    same_files(tmp_path / "out", tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_distillation_is_left_out_and_said_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(RECIPES, "fast", Recipe(**SMALL | {"steps": 3}, sign_rate=0.01, flip_rounds=1))
    source = save_float(llama(), tmp_path / "float")
    _, report = quantize(source, tmp_path / "out", True, preset="fast", dataset=ROWS)
    assert report["fit"]["distillation"] is None
    assert "distillation, which takes the whole model twice, is left out" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "fast"}, "the model would write the calibration text itself"),
        ({"dataset": ROWS, "target_bpw": 1.5}, "a target is shared out"),
        ({"method": "mpq", "bits": "auto", "target_bpw": 3.0}, "a target is shared out"),
    ],
)
def test_what_takes_the_whole_model_is_refused_up_front(options, said, tmp_path, monkeypatch):
    source = save_float(llama(), tmp_path / "float")
    monkeypatch.setattr(DiskModel, "__init__", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=f"low_memory is True, but {said}.*low_memory=False"):
        quantize(source, tmp_path / "out", True, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_models_that_cannot_be_read_block_by_block_are_refused(tmp_path):
    source = save_float(tiny_t5(), tmp_path / "t5")
    with pytest.raises(ValueError, match="no single stack of blocks"):
        quantize(source, tmp_path / "out", True, dataset=ROWS)
    with pytest.raises(ValueError, match="expected safetensors files"):
        quantize("model.gguf", tmp_path / "out", True)
    fused = save_float(tiny.tiny_mixtral(), tmp_path / "mixtral")
    tensors = contents(fused)[0]
    name = next(iter(tensors))
    save_file({f"other.{n}" if n == name else n: t for n, t in tensors.items()}, fused / "model.safetensors")
    with pytest.raises(ValueError, match=r"by the names and shapes.*low_memory=False"):
        quantize(fused, tmp_path / "out", True)
    assert not (tmp_path / "out").exists()


def test_the_mode_is_chosen_by_memory(tmp_path, monkeypatch, caplog):
    source = save_float(llama(), tmp_path / "float")
    chosen = []
    monkeypatch.setattr("hf_onebit.quantizer.quantize_files", lambda *_, **__: chosen.append(True))

    def runs(free, **options):
        chosen.clear()
        caplog.clear()
        monkeypatch.setattr(estimates, "available_memory", lambda *_: free)
        OneBitQuantizer.from_pretrained(source, **options).quantize(tmp_path / "out", load=False)
        return bool(chosen)

    assert not runs(10**12)
    assert runs(10**4)
    assert "block by block, with one block in memory at a time" in caplog.text
    assert runs(10**4, preset="fast", dataset=ROWS)
    assert not runs(10**4, low_memory=False)
    assert not runs(10**4, dataset=ROWS, target_bpw=1.9)
    assert "but a target is shared out" in caplog.text
    for config in (OneBitConfig, MPQConfig):
        assert "low_memory" not in config(low_memory=True).to_dict()
        with pytest.raises(ValueError, match="low_memory is 'auto'"):
            config(low_memory="auto")


def test_the_command_line_has_it(tmp_path, capsys, monkeypatch):
    source = save_float(llama(), tmp_path / "float", tiny_tokenizer())
    loaded = []
    monkeypatch.setattr(loading, "load_float", lambda *_, **__: pytest.fail("it was loaded whole"))
    monkeypatch.setattr(loading, "load", lambda *_, **__: loaded.append(True))
    words = ["quantize", str(source), "-o", str(tmp_path / "out"), "--preset", "closed", "--low-memory", "--json"]
    assert cli.main([*words, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert any("block by block" in note for note in planned["notes"])
    assert not (tmp_path / "out").exists()
    assert cli.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["preflight"]["disk_bytes"] == pytest.approx(planned["preflight"]["disk_bytes"])
    assert not loaded
    assert contents(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool])
def test_tensors_are_read_as_safetensors_reads_them(tmp_path, dtype):
    file = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.randn(3, 5).mul(9).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "b": torch.ones(7).to(dtype),
    }
    tensors["scalar"] = torch.ones(()).to(dtype)
    save_file(tensors, file)
    found = {name: stored.read() for name, stored in stored_tensors([file]).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(64, 64)}, file)
    whole = file.read_bytes()
    for cut in (whole[:-8], whole[:4], b"\xff" * 64, b""):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match="truncated or damaged"):
            stored_tensors([file])
    file.write_bytes(whole)
    stored = stored_tensors([file])["a"]
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="ends 8 bytes before"):
        stored.read()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_limits_of_the_process_count_as_memory(monkeypatch):
    import resource

    without = available_memory()
    limits = {resource.RLIMIT_DATA: 5 << 40, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], resource.RLIM_INFINITY))
    assert available_memory() == pytest.approx(without, rel=0.2)
    limits[resource.RLIMIT_DATA] = 1  # less than is in use
    assert available_memory() == 0
    text = Path("/proc/self/status").read_text(encoding="ascii")
    used = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmData"))
    limits[resource.RLIMIT_DATA] = used + (64 << 20)
    assert 0 < available_memory() <= 128 << 20


def run_script(*words: object, timeout: float = 600) -> str:
    """What the script printed last."""
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


def only(*layers: str) -> list[str]:
    """Patterns that leave all linear layers but the down_proj of some blocks in floating point."""
    numbers = "|".join(rf"{layer}\." for layer in layers)
    return [".*(q|k|v|o|gate|up)_proj", rf".*layers\.(?!{numbers})\d+", "lm_head"]


def capped(tmp_path: Path, sizes: tuple[int, ...], cap: str, *runs: dict) -> tuple[dict, list[dict]]:
    run_script("make", tmp_path / "float", *sizes)
    said = json.loads(run_script(tmp_path / "float", tmp_path / "out", cap, *map(json.dumps, runs), timeout=3600))
    return said, said["runs"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits data, and reads /proc/self/status")
def test_half_of_a_model_is_memory_enough(tmp_path):
    some = {"modules_to_not_convert": only("0", "28")}
    fast = {"method": "mpq", "preset": "fast", "rows": [4, 32], **some}
    sizes = 384, 1024, 29, 4000
    said, (prefix, closed, whole) = capped(tmp_path, sizes, "+106000000", fast, some, {"low_memory": False})
    assert said["float_bytes"] > 2 * 106_000_000
    for run in (prefix, closed):
        assert run["failed"] is None
        assert run["layers"] == 2
        assert run["preflight"]["seconds"] is None  # both chose to go block by block
        assert run["peak"] - said["imported"]["anonymous"] < 106_000_000
    assert prefix["fit"]
    assert "memory" in whole["failed"]  # so the cap is one


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits data, and reads /proc/self/status")
def test_a_model_of_2_4_gb_under_1_2_gb(tmp_path):
    fast = {"method": "mpq", "preset": "fast", "rows": [4, 32], "modules_to_not_convert": only("0", "22", "44")}
    sizes = 1024, 2816, 45, 16000
    said, (prefix, closed, whole) = capped(tmp_path, sizes, "1200000000", fast, {}, {"low_memory": False})
    assert said["float_bytes"] > 2_400_000_000
    for run, layers in ((prefix, 3), (closed, 7 * 45)):
        assert run["failed"] is None
        assert run["layers"] == layers
        assert run["peak"] < 1_200_000_000
    assert "memory" in whole["failed"]
