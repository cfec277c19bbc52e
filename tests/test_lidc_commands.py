"""Lung nodules by the commands, from a phantom to Dice and AUC: minutes, so only with make
test-slow."""

import json
from functools import partial

import numpy as np
import pytest

from ct_volumes.lidc_samples import read_samples

from .run_command import command as any_command

pytestmark = pytest.mark.slow
SIZE = 8  # voxels of a crop: the networks are the paper's, the work is a 216th
QUICK = [
    "train_cfg.max_epochs=2",
    f"train_dataloader.dataset.pipeline.0.size={SIZE}",
    *(f"{split}_dataloader.num_workers=0" for split in ("train", "val", "test")),
    *(f"{split}_dataloader.dataset.pipeline.0.size={SIZE}" for split in ("val", "test")),
]

command = partial(any_command, variable="LIDC_ROOT", timeout=None)


def test_from_phantom_to_dice_and_auc(repository, tmp_path):
    pytest.importorskip("monai", reason="needs the extra [volumes]")
    files, root = tmp_path / "files", tmp_path / "prepared"
    command(
        repository, "tools/make_phantom.py", "--lidc", files, "--patients", 6, "--size", 128,
        root=root,
    )  # fmt: skip
    output = command(
        repository, "tools/prepare_data.py", files, "--lidc", "--out", root, "--workers", 1,
        root=root,
    )  # fmt: skip
    _, samples = read_samples(root)
    tested = [s for s in samples if s.split == "test"]
    assert f"test: {len(tested)} nodules of 1 patients" in output

    for name, figure in (("seg_25d", "dice_global"), ("cls_acs", "auc")):
        config, folder = f"configs/acs_volumes/lidc_{name}.py", tmp_path / name
        command(
            repository, "tools/train.py", config, "--work-dir", folder, "--cfg-options", *QUICK,
            root=root,
        )  # fmt: skip
        output = command(
            repository, "tools/test.py", config, folder / "epoch_2.pth", "--work-dir",
            tmp_path / f"test_{name}", "--cfg-options", *QUICK, root=root,
        )  # fmt: skip
        assert f"Nodules/{figure}" in output and "was chosen by its score" not in output
        content = json.loads((tmp_path / f"test_{name}/nodules.json").read_text())
        names = [s.name for s in tested if name.startswith("seg") or s.is_rated]
        assert [nodule["name"] for nodule in content["nodules"]] == names
        assert not content["epoch_chosen_on_test"]
    assert all(0 <= nodule["probability"] <= 1 for nodule in content["nodules"])

    # The best epoch is named as what it is, and the reference is the crop's own mask.
    output = command(
        repository, "tools/test.py", "configs/acs_volumes/lidc_seg_25d.py", tmp_path / "seg_25d",
        "--work-dir", tmp_path / "best", "--cfg-options", *QUICK, root=root,
    )  # fmt: skip
    assert "was chosen by its score on the samples of this test" in output
    content = json.loads((tmp_path / "best/nodules.json").read_text())
    for nodule in content["nodules"]:
        with np.load(root / f"crops/{nodule['name']}.npz") as crop:
            edge = (crop["mask"].shape[0] - SIZE) // 2
            inner = crop["mask"][(slice(edge, edge + SIZE),) * 3]
        assert nodule["reference"] == inner.sum()
