"""Files of tensors past the page cache, with it, and in pieces; safetensors reads what is written."""

import errno
import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file

from lumina.checkpoint import tensor_file
from lumina.checkpoint.tensor_file import StoredTensors, TensorFile


def write(path, tensors):
    with TensorFile(path, {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, hash_tensors=True) as file:
        for key, tensor in tensors.items():
            file.write(key, tensor)
        file.close()
    return file.hashes


def some(numel):
    torch.manual_seed(numel)
    return {"a": torch.randn(numel), "b": torch.randn(7).bfloat16(), "c": torch.randn(numel, 3).bfloat16()}


def refuses_to_open(monkeypatch):
    opened = os.open

    def refuse(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)


def refuses_to_write(monkeypatch):
    """As a disk of larger blocks does."""
    import fcntl

    written = os.pwrite

    def refuse(fd, data, offset):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)


def writes_a_part(monkeypatch):
    written = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: written(fd, data[: max(1, len(data) // 2)], offset))


@pytest.mark.parametrize("disk", [None, refuses_to_open, refuses_to_write, writes_a_part])
@pytest.mark.parametrize("numel", [1, 1000, 2048, 5000, 40_000])
def test_what_is_written_is_read(tmp_path, monkeypatch, disk, numel):
    monkeypatch.setattr(tensor_file, "_CHUNK", 8192)  # many buffers
    if disk is not None:
        disk(monkeypatch)
    tensors = some(numel)
    hashes = write(tmp_path / "t.safetensors", tensors)
    found, stored = load_file(tmp_path / "t.safetensors"), StoredTensors(tmp_path / "t.safetensors")
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor)
        sha256 = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        values, read = stored.read(key)
        assert (hashes[key], read, stored.sha256(key)) == (sha256, sha256, sha256)
        assert values.dtype == torch.float32
        assert torch.equal(values, tensor.float().view(-1))


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "t.safetensors", some(9))
