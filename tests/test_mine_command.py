"""tools/mine_lesions.py, from a checkpoint to the annotation file of a second round."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from mmdet.registry import MODELS

from deeplesion.data.coco import read_annotations
from deeplesion.evaluation.mining import mine
from deeplesion.evaluation.results import read_results
from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.ignored_regions import IgnoredRegionsHook
from mmdet_ext.engine.run import load_config
from tools import mine_lesions as tool

from .mmdet_ext.small_detector import SMALL, config_of, write_checkpoint

CONFIG = "configs/demo/nofusion_3slice.py"
IGNORING = "configs/demo/ignored_regions.py"


@pytest.fixture(scope="module")
def root(phantom, tmp_path_factory):
    """The phantom, its first training key slice without labels."""
    root = tmp_path_factory.mktemp("missing") / "DeepLesion"
    (root / "annotations").mkdir(parents=True)
    for name in ("Images_png", "phantom_truth"):
        (root / name).symlink_to(phantom / name)
    for split in ("val", "test"):
        shutil.copy(phantom / f"annotations/{split}.json", root / "annotations")
    content = json.loads((phantom / "annotations/train.json").read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
    (root / "annotations/train.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def run(repository, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEEPLESION_ROOT", str(root))  # --data sets it, and nothing takes it back
    monkeypatch.chdir(repository)
    options = [f"{name}={value}".replace(" ", "") for name, value in SMALL.items()]
    workers = ["test_dataloader.num_workers=0"]

    def go(*arguments, checkpoint=tmp_path / "epoch_1.pth", out=tmp_path / "mined.json"):
        given = [CONFIG, checkpoint, "--data", root, "--out", out, *arguments]
        given += ["--cfg-options", *options, *workers]
        monkeypatch.setattr("sys.argv", ["mine_lesions.py", *map(str, given)])
        tool.main()
        return capsys.readouterr().out

    return go


def test_from_a_checkpoint_to_a_file_that_training_takes(
    run, root, repository, tmp_path, monkeypatch
):
    """Of random weights, which find lesions anywhere."""
    write_checkpoint(config_of(path=str(repository / CONFIG)), tmp_path / "epoch_1.pth")
    output = run("--score", "0.45", "--as", "labels")
    base = read_annotations(root / "annotations/train.json")
    content = read_annotations(tmp_path / "mined.json", need_lesions=True)
    records = read_results(tmp_path / "mined_teacher/training_images.json.gz").records
    mined = mine(records, base, 0.45)
    assert len(records) == len(base["images"]) and len(mined) > 0
    assert min(score for record in records for score in record["scores"]) >= 0.4499
    new = content["annotations"][len(base["annotations"]) :]
    assert 0 < len(new) <= len(mined) and all(a["segmentation"] for a in new)
    assert content["info"]["mined"]["kind"] == "labels"
    assert f": {len(new)} detections that score at least 0.45 lie on none of them\n" in output
    assert f"written as labels: {tmp_path / 'mined.json'}" in output
    truth = json.loads((root / "phantom_truth/truth.json").read_text())
    names = [image["file_name"] for image in base["images"]]
    missing = sum(len(truth[name]["lesions"]) for name in names) - len(base["annotations"])
    assert missing > 0 and f"in truth {missing} lesions of these key slices have no label" in output
    assert re.search(rf"^ *0\.45 +{len(mined)} ", output, re.M)

    kept = str(tmp_path / "mined_teacher/training_images.json.gz")
    monkeypatch.setattr(tool, "test", lambda *_, **options: kept)  # the same once more
    output = run("--score", "0.45")  # over its own file, as regions to ignore
    content = read_annotations(tmp_path / "mined.json", need_lesions=True, regions=True)
    regions = content["annotations"][len(base["annotations"]) :]
    assert len(regions) == len(mined) and all(a["iscrowd"] for a in regions)
    assert "written as regions to ignore" in output

    # Training: one config leaves them out, the other would learn them as background.
    for config, ignores in ((IGNORING, True), (CONFIG, False)):
        model = MODELS.build(load_config(config, SMALL).model)
        dataset = SimpleNamespace(metainfo=dict(ignored_regions=len(regions)))
        runner = SimpleNamespace(model=model, train_dataloader=SimpleNamespace(dataset=dataset))
        if ignores:
            IgnoredRegionsHook().before_train(runner)
        else:
            with pytest.raises(ConfigError, match=r"regions to ignore.*MaxIoUAssigner of rpn_head"):
                IgnoredRegionsHook().before_train(runner)
            dataset.metainfo["ignored_regions"] = 0
            IgnoredRegionsHook().before_train(runner)


def test_what_is_refused_before_the_work(run, root, tmp_path):
    for score in ("0", "1", "1.5", "nan"):
        with pytest.raises(SystemExit, match=r"--score is .*: give a number between 0 and 1"):
            run("--score", score)
    with pytest.raises(SystemExit, match="there is no folder nowhere: --data"):
        run("--data", "nowhere")
    train = root / "annotations/train.json"
    before = train.read_bytes()
    for file in (train, root / "annotations/val.json", root / "annotations"):
        with pytest.raises(SystemExit, match="is there already and no file of this command"):
            run(out=file)
    assert train.read_bytes() == before
    with pytest.raises(SystemExit, match=r"no checkpoint file .*epoch_1\.pth"):
        run()
    content = json.loads(before)
    content["annotations"][0]["iscrowd"] = 1
    (tmp_path / "ignored.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"ignored\.json holds regions to ignore, of an earlier"):
        run("--cfg-options", f"train_dataloader.dataset.ann_file={tmp_path / 'ignored.json'}")
    several = ["--cfg-options", "train_dataloader.dataset.ann_file=['a.json','b.json']"]
    with pytest.raises(SystemExit, match="it takes a train_dataloader of one annotation file"):
        run(*several)
    assert not (tmp_path / "mined.json").exists()
