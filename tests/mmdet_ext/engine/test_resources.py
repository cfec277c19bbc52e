"""A machine that has too little of something is noticed before the first iteration."""

import resource
from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn
from torch.utils.data import DataLoader

from mmdet_ext.engine import resources
from mmdet_ext.engine.averaging import AveragedWeightsHook
from mmdet_ext.engine.hooks import ResumableCheckpointHook
from mmdet_ext.engine.resources import TooLittle, check_disk, check_loader, tensors_in

from ..small_training import run

MB = 1 << 20


def shared_memory(monkeypatch, size):
    """`size` bytes are free in /dev/shm."""
    system = SimpleNamespace(f_bavail=size // 4096, f_frsize=4096)
    monkeypatch.setattr(resources.os, "statvfs", lambda path: system)


class Volumes(torch.utils.data.Dataset):
    """7 slices of 512 x 512 of 16 bits, as the recipe's: 3.7 MB."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        boxes = InstanceData(bboxes=torch.zeros(2, 4), labels=torch.zeros(2, dtype=torch.int64))
        return dict(inputs=torch.zeros(1, 7, 512, 512, dtype=torch.int16), data_samples=boxes)


def loader(workers=4, batch=8, **options):
    return DataLoader(Volumes(), batch, num_workers=workers, **options)


def test_a_sample_is_counted_to_its_last_tensor():
    sizes = [tensor.nbytes for tensor in tensors_in([Volumes()[0]])]
    assert sorted(sizes) == [16, 32, 7 * 512 * 512 * 2]


@pytest.mark.skipif(not resources.SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_the_default_of_containers_is_too_little_for_the_recipe(monkeypatch):
    """64 MB, 4 workers, batches of 8: 8 batches of 29 MB. Training hung for ever."""
    shared_memory(monkeypatch, 64 * MB)
    with pytest.raises(TooLittle) as little:
        check_loader(loader(), "train_dataloader")
    said = str(little.value)
    assert "train_dataloader needs 234.9 MB" in said and "67.1 MB are free in /dev/shm" in said
    assert "8 batches of 29.4 MB" in said
    assert "--shm-size" in said and "train_dataloader.num_workers=1 " in said
    assert "train_dataloader.num_workers=0" in said
    # Each remedy is one.
    assert check_loader(loader(1), "train_dataloader") is None
    assert check_loader(loader(0), "train_dataloader") is None
    shared_memory(monkeypatch, 8 << 30)
    assert check_loader(loader(), "train_dataloader") is None
    # Where not one worker has room, fewer are none.
    shared_memory(monkeypatch, 8 * MB)
    with pytest.raises(TooLittle) as little:
        check_loader(loader(), "train_dataloader")
    assert "fewer batches" not in str(little.value)


@pytest.mark.skipif(not resources.SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_processes_of_one_machine_share_its_memory(monkeypatch):
    shared_memory(monkeypatch, 300 * MB)
    assert check_loader(loader(), "train_dataloader") is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(TooLittle, match="16 batches"):
        check_loader(loader(), "train_dataloader")


def test_open_files(monkeypatch):
    shared_memory(monkeypatch, 1 << 40)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    said = check_loader(loader(), "val_dataloader")  # 100 + 8 batches of 8 x 4
    assert "this process has up to 356 files" in said and "val_dataloader.num_workers" in said
    with pytest.raises(TooLittle, match=r"a worker has up to 612 .* 256 are allowed.*ulimit -n"):
        check_loader(loader(batch=64), "val_dataloader")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 4096))
    assert check_loader(loader(batch=64), "val_dataloader") is None


def test_disk_for_checkpoints(monkeypatch, tmp_path):
    model = nn.Linear(999, 1000)  # 4 MB
    runner = SimpleNamespace(
        hooks=[ResumableCheckpointHook(max_keep_ckpts=2, save_best="FROC/average")],
        model=model,
        optim_wrapper=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        work_dir=tmp_path,
        max_epochs=20,
    )

    def disk(free):
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    disk(11e6)  # weights and momentum, 8 MB, and the best weights, 4 MB
    with pytest.raises(TooLittle, match=r"11\.0 MB free, and the first checkpoints need 12\.0 MB"):
        check_disk(runner)
    disk(31e6)  # two and a third that is written, 24 MB, and two best ones
    assert "that are kept need 32.0 MB" in check_disk(runner)
    (tmp_path / "epoch_1.pth").write_bytes(bytes(2_000_000))  # its place will be free
    assert check_disk(runner) is None
    runner.optim_wrapper = torch.optim.Adam(model.parameters())
    assert "that are kept need 44.0 MB" in check_disk(runner)
    runner.hooks.append(AveragedWeightsHook())  # 3 x (2 x 4 + 8) MB, and two best ones of 8 MB
    assert "that are kept need 64.0 MB" in check_disk(runner)
    runner.hooks = []
    assert check_disk(runner) is None


@pytest.mark.skipif(not resources.SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_a_run_looks_first(repository, phantom, tmp_path, monkeypatch):
    shared_memory(monkeypatch, 4096)
    with pytest.raises(TooLittle, match=r"train_dataloader needs .* of shared memory"):
        run(repository, phantom, tmp_path, **{"train_dataloader.num_workers": 2})
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob("*.lock"))
