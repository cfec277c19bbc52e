"""Checkpoint files: whole or not there, data or refused, through every door of the framework."""

import os
import pickle
import random
import re
import signal
import threading
from collections import Counter, OrderedDict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader
from torch import nn

import mmdet_ext.engine.runner
from deeplesion import files
from mmdet_ext.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    last_checkpoint,
    load_checkpoint_file,
    plain_data,
    save_checkpoint_file,
)
from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.hooks import ResumableCheckpointHook
from mmdet_ext.engine.run import build_runner, train
from mmdet_ext.engine.run import test as run_test
from mmdet_ext.models.pretrained import fetch_weights

from .small_training import configuration

CONTENT = {"state_dict": {"w": torch.arange(20.0)}, "meta": {"epoch": 1, "cfg": "a = 1"}}


class Code:
    """Makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Thing:
    """Not harmful, but not data."""


def same(content):
    """Whether it is CONTENT."""
    try:
        return content["meta"] == CONTENT["meta"] and torch.equal(
            content["state_dict"]["w"], CONTENT["state_dict"]["w"]
        )
    except Exception:
        return False


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_new_and_old_formats_load(tmp_path, zipped):
    torch.save(CONTENT, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert same(load_checkpoint_file(tmp_path / "a.pth"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    "thing, name",
    [
        (Thing(), r"\S+\.Thing"),
        (Code(Path("ran")), r"\S*mkdir"),
        (nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (np.ones(2), r"numpy\S*_reconstruct"),
        (HistoryBuffer([1], [1]), r"mmengine\S*HistoryBuffer"),
    ],
    ids=["class", "code", "module", "array", "mmengine"],
)
def test_what_is_no_data_is_named_and_refused(tmp_path, thing, name, zipped):
    file = tmp_path / "a.pth"
    torch.save({**CONTENT, "x": thing}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=f"a.pth is refused: .*call {name}.*state_dict"
    ) as error:
        load_checkpoint_file(file)
    assert "weights_only" not in str(error.value), "nobody is told how to load it all the same"


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "a.pth"
    for content in (b"", b"text", b"PK\x03\x04", pickle.dumps(Code(tmp_path / "ran"))):
        file.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=r"a\.pth is damaged"):
            load_checkpoint_file(file)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match=r"a\.pth holds a list"):
        load_checkpoint_file(file)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*none\.pth"):
        load_checkpoint_file(tmp_path / "none.pth")
    assert not (tmp_path / "ran").exists()


def test_no_altered_bit_goes_unnoticed(tmp_path):
    """torch alone loads other numbers from 35 of 100 such files, without a word."""
    file = tmp_path / "a.pth"
    torch.save(CONTENT, file)
    content = file.read_bytes()
    generator, outcome = random.Random(0), Counter()
    for i in range(len(content)):
        altered = bytearray(content)
        altered[i] ^= 1 << generator.randrange(8)
        file.write_bytes(altered)
        try:
            outcome["same" if same(load_checkpoint_file(file)) else "other"] += 1
        except DamagedCheckpoint:
            outcome["damaged"] += 1
    assert outcome["other"] == 0 and outcome["damaged"] > outcome["same"] > 0, outcome


def test_a_part_marked_as_a_folder_is_noticed(tmp_path):
    """The one bit that checksums do not cover: torch reads nothing, and gives what memory holds."""
    file = tmp_path / "a.pth"
    torch.save(CONTENT, file)
    content = bytearray(file.read_bytes())
    for entry in re.finditer(b"PK\x01\x02", bytes(content)):
        content[entry.start() + 38] |= 0x10
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="altered"):
        load_checkpoint_file(file)


def test_no_cut_goes_unnoticed(tmp_path):
    file = tmp_path / "a.pth"
    torch.save(CONTENT, file)
    content = file.read_bytes()
    for length in range(0, len(content), 50):
        file.write_bytes(content[:length])
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint_file(file)


def test_plain_data():
    module = nn.BatchNorm2d(2)
    data = plain_data(
        {
            "array": np.array([1.5, 2.5]),
            "number": np.float64(0.1),
            "counter": Counter([3, 3]),
            "path": Path("a/b"),
            "pair": (1, None),
            "weights": module.state_dict(),
        }
    )
    assert torch.equal(data["array"], torch.tensor([1.5, 2.5], dtype=torch.float64))
    assert type(data["number"]) is float and data["number"] == 0.1
    assert type(data["counter"]) is dict and data["counter"] == {3: 2}
    assert data["path"] == os.path.join("a", "b") and data["pair"] == (1, None)
    assert type(data["weights"]) is OrderedDict
    assert data["weights"]._metadata == module.state_dict()._metadata


def test_what_cannot_be_saved_is_named(tmp_path):
    save_checkpoint_file(CONTENT, tmp_path / "a.pth")
    with pytest.raises(TypeError, match=r"checkpoint\['info'\]\[1\] is a Thing"):
        save_checkpoint_file({"info": [1, Thing()]}, tmp_path / "a.pth")
    assert same(load_checkpoint_file(tmp_path / "a.pth"))


def test_a_full_disk_leaves_the_former_file_alone(tmp_path, monkeypatch):
    save_checkpoint_file(CONTENT, tmp_path / "a.pth")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint_file({}, tmp_path / "a.pth")
    assert same(load_checkpoint_file(tmp_path / "a.pth"))
    assert [f.name for f in tmp_path.iterdir()] == ["a.pth"]


def test_content_is_on_disk_before_its_name_and_the_name_before_going_on(tmp_path, monkeypatch):
    calls = []

    def fsync(descriptor):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def replace(source, target):
        assert load_checkpoint_file(source), "not written when it is renamed"
        calls.append((Path(source).name, Path(target).name))
        os.rename(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    save_checkpoint_file(CONTENT, tmp_path / "a.pth")
    assert calls == ["a.pth.part", ("a.pth.part", "a.pth"), tmp_path.name]


def test_last_checkpoint_is_the_named_one_then_the_newest(tmp_path):
    assert last_checkpoint(tmp_path) == (None, [])
    names = ("epoch_9.pth", "epoch_10.pth", "iter_7.pth", "best_a_epoch_3.pth", "other.pth")
    for age, name in enumerate(names):
        save_checkpoint_file(CONTENT, tmp_path / name)
        os.utime(tmp_path / name, (age, age))
    assert last_checkpoint(tmp_path)[0].name == "iter_7.pth"
    # The run's folder may have been moved since.
    (tmp_path / "last_checkpoint").write_text("/elsewhere/epoch_9.pth")
    assert last_checkpoint(tmp_path)[0].name == "epoch_9.pth"
    (tmp_path / "epoch_9.pth").write_bytes(b"PK")
    path, damaged = last_checkpoint(tmp_path)
    assert path.name == "iter_7.pth" and len(damaged) == 1 and "epoch_9.pth" in damaged[0]
    for name in ("epoch_10.pth", "iter_7.pth"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(DamagedCheckpoint, match=r"no whole checkpoint(.*\n)*.*epoch_9\.pth"):
        last_checkpoint(tmp_path)


def saving(work_dir, metric=None, **options):
    """A hook, and a runner that saves its epoch; as much of one as the hook needs."""
    hub = MessageHub(f"test_checkpoint_{work_dir}")
    runner = SimpleNamespace(
        work_dir=str(work_dir), message_hub=hub, logger=SimpleNamespace(info=print)
    )
    runner.save_checkpoint = lambda path, resumable=True: save_checkpoint_file(
        {"epoch": runner.epoch + 1, "weights": torch.zeros(5000)}, path
    )
    runner.max_epochs = runner.max_iters = 100
    return ResumableCheckpointHook(save_best=metric, **options), runner


def names(work_dir):
    return sorted(f.name for f in work_dir.iterdir())


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    hook, runner = saving(tmp_path, metric="FROC/average", max_keep_ckpts=2)
    for epoch, score in enumerate((1.0, 3.0, float("nan"), 2.0)):
        runner.epoch = epoch
        hook.after_train_epoch(runner)
        runner.epoch = epoch + 1
        hook.after_val_epoch(runner, {"FROC/average": score})
    best = "best_FROC_average_epoch_2.pth"
    assert names(tmp_path) == [best, "epoch_3.pth", "epoch_4.pth", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_4.pth")
    with pytest.raises(ConfigError, match=r"save_best='FROC/average' is none of \['loss'\]"):
        hook.after_val_epoch(runner, {"loss": 1.0})


def test_less_may_be_better_and_all_may_be_kept(tmp_path):
    hook, runner = saving(tmp_path, metric="loss", rule="less", max_keep_ckpts=-1, interval=2)
    for epoch, score in enumerate((3.0, 1.0, 2.0, 1.5, float("nan"))):
        runner.epoch = epoch
        hook.after_train_epoch(runner)
        runner.epoch = epoch + 1
        hook.after_val_epoch(runner, {"loss": score})
    expected = ["best_loss_epoch_2.pth", "epoch_2.pth", "epoch_4.pth", "last_checkpoint"]
    assert names(tmp_path) == expected
    with pytest.raises(ValueError, match="rule must be"):
        ResumableCheckpointHook(rule="more")


def test_names_in_a_strangers_checkpoint_reach_no_other_folder(tmp_path):
    victim = tmp_path / "epoch_0.pth"
    victim.touch()
    hook, runner = saving(tmp_path / "run", metric="FROC/average", max_keep_ckpts=1)
    runner.message_hub.update_info("checkpoints", [str(victim), "../epoch_0.pth"])
    runner.message_hub.update_info("best", str(victim))
    runner.epoch = 1
    hook.after_train_epoch(runner)
    hook.after_val_epoch(runner, {"FROC/average": 1.0})
    assert victim.exists() and len(names(tmp_path / "run")) == 3


class Kill:
    """Kills the process at the n-th of the system calls that saving makes."""

    def __init__(self, number):
        self.number = number

    def __call__(self, call):
        def killing(*arguments, **options):
            self.number -= 1
            if self.number == 0:
                if call is os.fsync:  # what was written is half there
                    size = os.fstat(arguments[0]).st_size
                    if size and (os.fstat(arguments[0]).st_mode & 0o170000) == 0o100000:
                        os.ftruncate(arguments[0], size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return killing


def test_kill_9_at_every_system_call_leaves_a_whole_checkpoint(tmp_path):
    """One checkpoint is kept; the process dies while it saves the next."""
    for number in range(1, 100):
        work_dir = tmp_path / str(number)
        hook, runner = saving(work_dir, max_keep_ckpts=1)
        runner.epoch = 0
        hook.after_train_epoch(runner)
        runner.epoch = 1
        child = os.fork()
        if child == 0:
            kill = Kill(number)
            for name in ("fsync", "replace", "unlink", "open"):
                setattr(os, name, kill(getattr(os, name)))
            hook.after_train_epoch(runner)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        path, damaged = last_checkpoint(work_dir)
        assert not damaged
        assert load_checkpoint_file(path)["epoch"] in (1, 2)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert number > 8, "the calls that saving makes were not found"
    assert names(work_dir) == ["epoch_2.pth", "last_checkpoint"]


# The doors -----------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path):
    """A checkpoint that makes the folder `ran` when it is loaded with pickle."""
    torch.save({**CONTENT, "x": Code(tmp_path / "ran")}, tmp_path / "epoch_1.pth")
    yield tmp_path / "epoch_1.pth"
    assert not (tmp_path / "ran").exists(), "code in the checkpoint was run"


def test_pickle_would_run_it(tmp_path):
    pickle.loads(pickle.dumps(Code(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def through_test(config, evil):
    run_test(config, str(evil))


def through_resume(config, evil):
    train(config, resume=str(evil))


def through_auto_resume(config, evil):
    config.work_dir = str(evil.parent)
    train(config, resume="auto")


def through_load_from(config, evil):
    config.load_from = str(evil)
    train(config)


def through_backbone(config, evil):
    config.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(evil))
    train(config)


def through_any_module(config, evil):
    config.model.neck.init_cfg = dict(type="Pretrained", checkpoint=str(evil))
    train(config)


def through_part_of_a_checkpoint(config, evil):
    config.model.neck.init_cfg = dict(type="Pretrained", checkpoint=str(evil), prefix="neck.")
    train(config)


def through_a_download(config, evil):
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    cache.mkdir()
    evil.rename(cache / evil.name)
    config.load_from = f"https://127.0.0.1:9/{evil.name}"
    train(config)


@pytest.mark.parametrize(
    "door", [value for name, value in list(globals().items()) if name.startswith("through_")]
)
def test_code_is_refused_at_every_door(door, evil, repository, phantom, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = configuration(repository, phantom, tmp_path / "work", custom_hooks=[])
    with pytest.raises(CheckpointError, match=r"epoch_1\.pth is refused: .*mkdir"):
        door(config, evil)


def test_every_loader_of_mmengine_is_replaced():
    for prefix, loader in CheckpointLoader._schemes.items():
        assert loader.__module__ == mmdet_ext.engine.runner.__name__, prefix
    with pytest.raises(CheckpointError, match="from a file or an http"):
        CheckpointLoader.load_checkpoint("torchvision://resnet18")


def test_config_text_in_a_checkpoint_is_not_run(repository, phantom, tmp_path):
    config = configuration(repository, phantom, tmp_path / "work")
    runner = build_runner(config)
    text = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    content = {"state_dict": runner.model.state_dict(), "meta": {"config": text, "cfg": text}}
    content["meta"].update(epoch=1, iter=1)
    torch.save({**content, "optimizer": {}, "message_hub": {}}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"a\.pth holds no training, param_schedulers, gradients"
    ):
        train(config, resume=str(tmp_path / "a.pth"))
    assert not (tmp_path / "ran").exists()


def test_weights_alone_do_not_resume_and_must_fit(repository, phantom, tmp_path):
    config = configuration(repository, phantom, tmp_path / "work")
    weights = build_runner(config).model.state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"cannot be resumed.*load_from=.*weights\.pth"):
        train(config, resume=str(tmp_path / "weights.pth"))
    config = configuration(repository, phantom, tmp_path / "work")
    weights.popitem()
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match=r"weights\.pth does not fit the config: [\s\S]*missing"
    ):
        run_test(config, str(tmp_path / "weights.pth"))


def test_download_is_held_against_the_hash_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    save_checkpoint_file(CONTENT, tmp_path / "weights-01234567.pth")
    save_checkpoint_file(CONTENT, tmp_path / "weights.pth")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(CheckpointError, match="invalid hash value"):
            fetch_weights(f"{address}/weights-01234567.pth")
        assert same(fetch_weights(f"{address}/weights.pth"))
        server.shutdown()
    assert same(fetch_weights(f"{address}/weights.pth")), "it is fetched once"
    assert names(tmp_path / "hub/checkpoints") == ["weights.pth"]
