"""Checkpoint folders: what is written, what the checksums say, and that there is never half a checkpoint."""

import hashlib
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import write_gptq, write_onecomp
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny import CHAT_TEMPLATE, save_float, tiny_gpt2, tiny_ids, tiny_llama, tiny_llama_ragged, tiny_tokenizer
from torch import Tensor
from transformers import AutoTokenizer

import hf_onebit
from hf_onebit import MPQQuantizer, OneBitQuantizer
from hf_onebit.digests import sha256_of_file, sha256_of_tensor
from hf_onebit.formats.onebit import storage_bits
from hf_onebit.interchange.importing import import_checkpoint
from hf_onebit.storage import checkpoint
from hf_onebit.storage.checkpoint import (
    CHAT_TEMPLATES,
    atomic_folder,
    file_figures,
    read_side_file,
    record_evaluation,
    weight_files,
)
from hf_onebit.storage.exchange import exchange
from hf_onebit.storage.headers import read_headers
from hf_onebit.storage.verification import verify


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed tiny Llama as our own save writes it; read only."""
    folder = tmp_path_factory.mktemp("checkpoint") / "packed"
    quantizer = OneBitQuantizer()
    model = quantizer.quantize_model(tiny_llama_ragged())
    quantizer.save(model, folder, tokenizer=tiny_tokenizer(), provenance={"base_model": "someone/tiny"})
    return folder


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------------------------- the side file


def test_the_side_file_names_every_file_with_its_size_and_digest(saved: Path) -> None:
    side = json.loads((saved / "hf_onebit.json").read_text())
    assert set(side) == {"format_version", "hf_onebit", "provenance", "report", "files", "tensors"}
    assert side["format_version"] == 1
    assert side["hf_onebit"] == hf_onebit.__version__
    assert side["provenance"] == {"base_model": "someone/tiny"}
    assert set(side["files"]) == set(os.listdir(saved)) - {"hf_onebit.json"}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(side["files"])
    for name, recorded in side["files"].items():
        content = (saved / name).read_bytes()
        assert recorded == {"bytes": len(content), "sha256": digest(content)}


def test_the_side_file_names_every_tensor_with_its_digest(saved: Path) -> None:
    side = read_side_file(saved)
    assert side is not None
    content = (saved / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    expected = {name: digest(content[start + first : start + last]) for name, (first, last) in spans.items()}
    assert side["tensors"] == expected
    assert len(expected) == 14 * 3 + 7  # three tensors a packed layer; embedding, head and norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 5)])
def test_digests_of_tensors_are_those_of_their_bytes_in_a_file(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 100 - 50).to(dtype)
    content = save({"x": tensor})
    assert sha256_of_tensor(tensor) == digest(content[8 + int.from_bytes(content[:8], "little") :])
    if tensor.dim() == 2:
        assert sha256_of_tensor(tensor.t().contiguous().t()) == sha256_of_tensor(tensor)  # strides do not count


def test_a_digest_tells_apart_what_differs() -> None:
    one = torch.tensor([1.0, 2.0])
    others = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.5]), one.half(), torch.tensor([-1.0, 2.0])]
    digests = {sha256_of_tensor(tensor) for tensor in (one, *others)}
    assert len(digests) == 5


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_digests_of_files_of_every_length(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == digest(content)


# ---------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("make", [tiny_llama_ragged, tiny_gpt2])
@pytest.mark.parametrize("planes", [1, 2])
def test_bits_per_weight_of_the_file_count_the_file(tmp_path: Path, make: Any, planes: int) -> None:
    model = make()
    total = sum(parameter.numel() for parameter in model.parameters())
    quantizer = OneBitQuantizer(planes=planes)
    quantizer.save(quantizer.quantize_model(model), tmp_path / "packed")
    report = quantizer.report
    assert report is not None
    on_disk = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert report["file_bytes"] == on_disk
    assert report["total_weights"] == total
    assert report["file_bpw"] == 8 * on_disk / total
    layers = report["layers"].values()
    least = sum(storage_bits(r["in_features"], r["out_features"], planes) for r in layers)
    assert 8 * on_disk > least + 16 * (total - sum(r["in_features"] * r["out_features"] for r in layers))
    side = read_side_file(tmp_path / "packed")
    assert side is not None
    assert side["report"] == json.loads(json.dumps(report))


def test_figures_count_all_weight_files_and_nothing_else(tmp_path: Path) -> None:
    for name, size in (("model-1.safetensors", 30), ("model-2.safetensors", 12), ("tokenizer.json", 999)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert file_figures(tmp_path, 84) == {"file_bytes": 42, "file_bpw": 4.0}
    assert file_figures(tmp_path, None) == {"file_bytes": 42, "file_bpw": None}


# ----------------------------------------------------------------------------------------------------- shards


def test_shards_round_trip_and_verify(saved: Path, tmp_path: Path) -> None:
    quantizer = OneBitQuantizer()
    model = quantizer.quantize_model(tiny_llama_ragged())
    quantizer.save(model, tmp_path / "sharded", max_shard_size="60KB")
    files = weight_files(tmp_path / "sharded")
    assert len(files) > 2
    assert verify(tmp_path / "sharded") == {"ok": True, "checksums": "match", "tensors": 49, "problems": []}
    whole = load_file(saved / "model.safetensors")
    assert set(read_headers(files)) == set(whole)
    assert {info.file for info in read_headers(files).values()} == {file.name for file in files}
    for file in files:
        assert all(torch.equal(whole[name], tensor) for name, tensor in load_file(file).items())
    assert quantizer.report is not None
    assert quantizer.report["file_bytes"] == sum(file.stat().st_size for file in files)
    ids = tiny_ids()
    assert torch.equal(hf_onebit.load(tmp_path / "sharded")(ids).logits, hf_onebit.load(saved)(ids).logits)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        (tmp_path / name).write_bytes(save({"x": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"'x' is in both one\.safetensors and two\.safetensors: delete the stale"):
        read_headers([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_the_single_file_that_is_loaded_is_the_one_that_is_checked(saved: Path, tmp_path: Path) -> None:
    # Transformers reads model.safetensors where there is one, whatever an index beside it says.
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "other.safetensors"}}')
    (tmp_path / "other.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


# ----------------------------------------------------------------------------- several chat templates, headers


def two_template_tokenizer() -> Any:
    """As Command-R has: "default" and one more, which Transformers saves in a folder of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ messages[0]['content'] }}"}
    return tokenizer


@pytest.mark.parametrize("way", ["quantizer.save", "hf_onebit.save", "low memory", "import", "save_pretrained"])
def test_a_tokenizer_of_several_chat_templates_is_saved_and_saved_over(tmp_path: Path, way: str) -> None:
    target, tokenizer = tmp_path / "packed", two_template_tokenizer()
    quantizer = OneBitQuantizer()
    model = quantizer.quantize_model(tiny_llama())
    if way == "save_pretrained":
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    def write() -> None:
        if way == "low memory":
            source = save_float(tiny_llama(), tmp_path / "float", tokenizer)
            OneBitQuantizer.from_pretrained(source, low_memory=True).quantize(target, load=False)
        elif way == "import":
            write_gptq(tiny_llama(), tmp_path / "gptq")
            tokenizer.save_pretrained(tmp_path / "gptq")
            import_checkpoint(tmp_path / "gptq", target)
        elif way == "quantizer.save":
            quantizer.save(model, target, tokenizer=tokenizer)
        else:
            hf_onebit.save(model, target, tokenizer=tokenizer)

    template = target / CHAT_TEMPLATES / "tool_use.jinja"
    for _ in range(2):
        write()
        side = read_side_file(target)
        assert side is not None
        recorded = side["files"]["additional_chat_templates/tool_use.jinja"]
        assert recorded == {"bytes": template.stat().st_size, "sha256": sha256_of_file(template)}
        assert (verify(target)["ok"], verify(target)["checksums"]) == (True, "match")
    assert AutoTokenizer.from_pretrained(target).chat_template == tokenizer.chat_template
    template.write_text("{{ nothing }}")
    assert [problem.split(" has ")[0] for problem in verify(target)["problems"]] == [
        "additional_chat_templates/tool_use.jinja"
    ]


@pytest.mark.parametrize("method", ["onebit", "mpq"])
@pytest.mark.parametrize("way", ["plain", "low memory", "import"])
def test_every_writer_puts_the_same_strings_into_the_header(tmp_path: Path, method: str, way: str) -> None:
    target, quantizer = tmp_path / "packed", OneBitQuantizer if method == "onebit" else MPQQuantizer
    if way == "plain":
        quantizer().quantize_model(tiny_llama()).save_pretrained(target)
    elif way == "low memory":
        source = save_float(tiny_llama(), tmp_path / "float", tiny_tokenizer())
        quantizer.from_pretrained(source, low_memory=True).quantize(target, load=False)
    else:
        (write_onecomp if method == "onebit" else write_gptq)(tiny_llama(), tmp_path / "foreign")
        import_checkpoint(tmp_path / "foreign", target)
    with safe_open(target / "model.safetensors", "pt") as file:
        found = file.metadata()
    page = (Path(__file__).resolve().parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page.partition("## Header of the safetensors files")[2].partition("## ")[0]
    assert set(found) == set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert found == {
        "format": "pt",
        "quant_library": "hf_onebit",
        "quant_library_version": hf_onebit.__version__,
        "quant_method": method,
        "quant_format_version": "1",
    }


# --------------------------------------------------------------------------------------------------- evaluations


def test_a_full_disk_parts_no_figures_from_their_checksum(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "packed"))
    before = contents(folder)

    def write(path: Path, content: bytes) -> None:
        if "hf_onebit.json" in path.name:
            raise OSError("No space left on device")
        with open(path, "wb") as file:
            file.write(content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        patch.setattr(Path, "write_text", lambda path, text, **_: write(path, text.encode()))
        with pytest.raises(OSError, match="No space left"):
            record_evaluation(folder, {"data": "a.txt", "perplexity": 7.0})
    assert contents(folder) == before
    record_evaluation(folder, {"data": "a.txt", "perplexity": 7.0})
    assert verify(folder) == {"ok": True, "checksums": "match", "tensors": 49, "problems": []}
    assert set(contents(folder)) == set(before)


# ----------------------------------------------------------------------------------------------------- verify


def test_verify_of_our_own_save(saved: Path) -> None:
    assert verify(saved) == {"ok": True, "checksums": "match", "tensors": 49, "problems": []}


def test_verify_of_a_plain_save_has_no_checksums_to_compare(tmp_path: Path) -> None:
    OneBitQuantizer().quantize_model(tiny_llama()).save_pretrained(tmp_path / "plain")
    assert read_side_file(tmp_path / "plain") is None
    assert verify(tmp_path / "plain") == {"ok": True, "checksums": "none", "tensors": 49, "problems": []}


def test_verify_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no folder '.*absent' to verify"):
        verify(tmp_path / "absent")


# ----------------------------------------------------------------------------------------------- atomic folders


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("new")
        assert not target.exists()
        assert folder.parent == target.parent  # one file system, so that a rename is enough
    assert contents(target) == {"file": b"new"}
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("at_once", [True, False])
def test_an_old_checkpoint_is_replaced_as_a_whole(
    tmp_path: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(checkpoint, "exchange", lambda one, other: False)
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "stale").write_text("old")
    with atomic_folder(target) as folder:
        (folder / "config.json").write_text("new")
        assert contents(target) == {"config.json": b"old", "stale": b"old"}
    assert contents(target) == {"config.json": b"new"}
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [True, False])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException], old: bool) -> None:
    target = tmp_path / "target"
    if old:
        target.mkdir()
        (target / "config.json").write_text("old")

    def fail() -> None:
        with atomic_folder(target) as folder:
            (folder / "config.json").write_text("new")
            raise error("full")

    with pytest.raises(error, match="full"):
        fail()
    assert os.listdir(tmp_path) == (["target"] if old else [])
    if old:
        assert contents(target) == {"config.json": b"old"}


def test_a_failing_rename_brings_the_old_checkpoint_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = os.rename

    def fails_once(source: Any, destination: Any) -> None:
        if str(source).endswith(".partial"):
            raise OSError("busy")
        rename(source, destination)

    monkeypatch.setattr(checkpoint, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(OSError, match="busy"):
        with atomic_folder(target) as folder:
            (folder / "config.json").write_text("new")
    assert contents(target) == {"config.json": b"old"}
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is of Linux")
def test_folders_change_places_in_one_step(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).write_text("")
    assert exchange(one, other)
    assert (os.listdir(one), os.listdir(other)) == (["other"], ["one"])
    assert not exchange(one, tmp_path / "missing")
    assert os.listdir(one) == ["other"]


@pytest.mark.parametrize("replaced", [True, False])
def test_what_a_killed_replacement_left_is_put_back_or_removed(tmp_path: Path, replaced: bool) -> None:
    target = tmp_path / "target"
    old = tmp_path / ".target.abc.old"  # as between the two renames, and after them
    (old / "checkpoint").mkdir(parents=True)
    (old / "checkpoint" / "config.json").write_text("old")
    if replaced:
        target.mkdir()
        (target / "config.json").write_text("new")
    with pytest.raises(RuntimeError, match="full"), atomic_folder(target):
        raise RuntimeError("full")
    assert contents(target) == {"config.json": b"new" if replaced else b"old"}
    assert os.listdir(tmp_path) == ["target"]


def test_an_empty_folder_may_be_the_target(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("new")
    assert contents(tmp_path / "target") == {"file": b"new"}


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "target") as folder:
            (folder / "file").write_text("new")
        assert os.umask(mask) == mask  # still the one that was set
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o777 & ~mask


def test_saving_twice_replaces_and_saving_a_reloaded_model_keeps_every_tensor(saved: Path, tmp_path: Path) -> None:
    model = hf_onebit.load(saved)
    hf_onebit.save(model, tmp_path / "again", max_shard_size="60KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    side = hf_onebit.save(model, tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert os.listdir(tmp_path) == ["again"]
    old = read_side_file(saved)
    assert old is not None
    assert side["tensors"] == old["tensors"]
    assert verify(tmp_path / "again")["ok"]


def test_a_save_of_the_model_alone_keeps_the_tokenizer_of_the_checkpoint_that_it_replaces(
    saved: Path, tmp_path: Path
) -> None:
    target = shutil.copytree(saved, tmp_path / "model")
    (target / "NOTICE").write_text("put there by hand")
    model = hf_onebit.load(target)
    side = hf_onebit.save(model, target)
    for name in ("tokenizer.json", "tokenizer_config.json", "NOTICE"):
        assert (target / name).is_file()
        assert name in side["files"]
    assert verify(target)["ok"]


def test_a_save_keeps_no_tokenizer_of_another_model(saved: Path, tmp_path: Path) -> None:
    target = shutil.copytree(saved, tmp_path / "model")
    model = hf_onebit.load(saved)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    side = hf_onebit.save(model, target)
    assert "tokenizer.json" not in side["files"]


def test_digests_read_big_tensors_of_odd_strides() -> None:
    tensor: Tensor = torch.arange(24, dtype=torch.int32).reshape(4, 6)[:, ::2]
    assert sha256_of_tensor(tensor) == digest(tensor.numpy().tobytes())
