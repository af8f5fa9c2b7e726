"""Kernels on disk: read back as written, and written atomically."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from ntk.scale import storage
from ntk.scale.storage import StorageError, load_kernels, save_kernels, write_text

HEADER = {"model": "tiny", "spaces": {"rows:1": "rows:1+head"}, "seeds": [0, 1], "x": 1}


@pytest.fixture
def kernels():
    values = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    return {
        "full": values,
        "rows:3@query,value/layers=0": values.transpose(0, 1),
        "trace": torch.randn(3, 2, dtype=torch.float32).requires_grad_(),
    }


def test_round_trip(tmp_path, kernels):
    file = tmp_path / "kernels.safetensors"
    save_kernels(file, kernels, HEADER)
    found, header = load_kernels(file)
    assert header == {"format": storage.FORMAT, "axes": storage.AXES, **HEADER}
    assert set(found) == set(kernels)
    for name, kernel in kernels.items():
        assert found[name].dtype == kernel.dtype
        assert torch.equal(found[name], kernel)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_kernels_that_are_one_tensor(tmp_path, kernels):
    file = tmp_path / "kernels.safetensors"
    full = kernels["full"]
    save_kernels(file, {"full": full, "again": full, "first": full[:2]}, HEADER)
    found, _ = load_kernels(file)
    assert torch.equal(found["again"], full)
    assert torch.equal(found["first"], full[:2])


def test_a_file_is_replaced(tmp_path, kernels):
    file = tmp_path / "kernels.safetensors"
    save_kernels(file, kernels, HEADER)
    save_kernels(file, {"other": torch.ones(2, 2)}, {})
    assert list(load_kernels(file)[0]) == ["other"]


def test_files_have_the_usual_permissions(tmp_path, kernels):
    """Those of any other new file, not those of a temporary one."""
    save_kernels(tmp_path / "kernels.safetensors", kernels, HEADER)
    write_text(tmp_path / "text", "words")
    modes = {file.name: oct(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(modes, oct(stat.S_IFREG | 0o644))


def test_damaged_files(tmp_path, kernels):
    file = tmp_path / "kernels.safetensors"
    save_kernels(file, kernels, HEADER)
    whole = file.read_bytes()
    for content in (b"", b"not a file of tensors", whole[:-8], whole[:40]):
        file.write_bytes(content)
        with pytest.raises(StorageError, match="is damaged"):
            load_kernels(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "holds no kernels: its format is None"),
        ({"format": "pt"}, "holds no kernels: its format is None"),
        ({"ntk": '{"format": "old"}'}, "its format is 'old', not 'ntk-kernels-1'"),
        ({"ntk": "{"}, "is damaged"),
    ],
)
def test_foreign_files(tmp_path, metadata, message):
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, file, metadata)
    with pytest.raises(StorageError, match=message):
        load_kernels(file)


def test_values_that_were_changed_afterwards(tmp_path, kernels):
    path = tmp_path / "kernels.safetensors"
    save_kernels(path, kernels, {"task": "sst2", "sizes": {"full": 12}})
    whole = path.read_bytes()
    load_kernels(path)
    for place in (-1, -9, whole.index(b"sst2")):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(StorageError, match="not those that were written"):
            load_kernels(path)


def test_missing_file(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        load_kernels(tmp_path / "kernels.safetensors")


def test_folders_that_cannot_be_written_to(tmp_path, kernels):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "k", tmp_path / "absent" / "k"):
        with pytest.raises(StorageError, match=r"could not be written.*--output"):
            save_kernels(place, kernels, HEADER)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_without_permission(tmp_path, kernels):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        save_kernels(tmp_path / "k", kernels, HEADER)


def test_a_full_disk_keeps_the_earlier_file_and_leaves_nothing_else(
    tmp_path, kernels, monkeypatch
):
    file = tmp_path / "kernels.safetensors"
    save_kernels(file, kernels, HEADER)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(StorageError, match="could not be written: No space left"):
        save_kernels(file, kernels, HEADER)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_interrupted_write_leaves_nothing(tmp_path, kernels, monkeypatch):
    def stop(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        save_kernels(tmp_path / "kernels.safetensors", kernels, HEADER)
    assert list(tmp_path.iterdir()) == []


def test_text_is_utf8(tmp_path):
    file = tmp_path / "report.md"
    write_text(file, "naïve ± 1\n")
    assert file.read_bytes() == "naïve ± 1\n".encode()
