"""tools/optimize_anchors.py: the boxes of training, the command, and what it refuses."""

import ast
import json
import re

import numpy as np
import pytest
from mmdet.registry import TASK_UTILS, TRANSFORMS
from mmengine.config import Config

from deeplesion.data.anchors import best_overlaps
from mmdet_ext.engine.run import load_config
from tools.optimize_anchors import (
    boxes_in_training,
    images_of,
    main,
    replaced,
    resize_of,
    sizes_of,
)

CONFIG = "configs/demo/nofusion_3slice.py"


@pytest.fixture(autouse=True)
def few_boxes(monkeypatch):
    monkeypatch.setattr("tools.optimize_anchors.BOXES", 300)


@pytest.fixture
def run(repository, tmp_path, monkeypatch, capsys):
    """Runs the command; -> what it printed."""
    monkeypatch.chdir(repository)

    def go(*arguments):
        argv = ["optimize_anchors.py", *arguments, "--config", CONFIG]
        monkeypatch.setattr("sys.argv", [str(a) for a in argv])
        main()
        return capsys.readouterr().out

    return go


def read_boxes(path):
    """Widths and heights in the file's pixels."""
    return np.array([a["bbox"][2:] for a in json.loads(path.read_text())["annotations"]])


def test_boxes_are_those_of_the_training_pipeline(repository, phantom):
    """Without augmentation the file's, scaled; with it the pipeline's own, and of their lesion."""
    path = phantom / "annotations/train.json"
    images, sizes = images_of(path, []), read_boxes(path)
    config = load_config(str(repository / CONFIG))
    plain = TRANSFORMS.build(dict(type="RandomAffineResize", size=192, augment=False))
    boxes, copies = boxes_in_training(images, plain, 0)
    assert copies == 1, "they would all be the same"
    np.testing.assert_allclose(boxes.sizes, sizes * 192 / 128, rtol=1e-4)

    resize = TRANSFORMS.build(resize_of(config) | dict(prob=1.0, rotation=0.0, shift=0.0))
    boxes, copies = boxes_in_training(images, resize, 0)
    assert len(boxes.sizes) == copies * len(sizes) > 280
    zoom = boxes.sizes / (sizes[boxes.lesion] * 192 / 128)
    np.testing.assert_allclose(zoom[:, 0], zoom[:, 1], rtol=1e-4)
    assert 0.8 <= zoom.min() < 0.82 and 1.18 < zoom.max() < 1.2001


def test_files_of_a_second_round(phantom, tmp_path):
    """Mined lesions have no RECIST and leave the boxes of the others as they are; regions to ignore
    are none."""
    content = json.loads((phantom / "annotations/train.json").read_text())
    first = content["images"][0]["id"]
    found = {}
    for name, crowd in (("plain", None), ("labels", 0), ("ignored", 1)):
        mined = dict(id=10_000, image_id=first, category_id=1, bbox=[3, 4, 10, 12], iscrowd=crowd)
        new = {**content, "annotations": content["annotations"] + [mined] * (crowd is not None)}
        (tmp_path / f"{name}.json").write_text(json.dumps(new))
        found[name] = images_of(tmp_path / f"{name}.json", [])
    assert found["ignored"] == found["plain"]
    assert len(found["labels"][0]["lesions"]) == len(found["plain"][0]["lesions"]) + 1
    resize = TRANSFORMS.build(
        dict(type="RandomAffineResize", size=192, prob=1.0, shift=0.0, scale=0.0, rotation=30.0)
    )
    labels, plain = (boxes_in_training(found[n][:1], resize, 0)[0] for n in ("labels", "plain"))
    number = len(found["plain"][0]["lesions"])
    both = min(map(len, (labels.sizes[labels.lesion < number], plain.sizes)))
    np.testing.assert_allclose(labels.sizes[labels.lesion < number][:both], plain.sizes[:both])


def test_the_table_of_lesions_gives_the_boxes_of_the_annotation_files(phantom):
    of_table = images_of(phantom / "DL_info.csv", ["val", "test"])
    of_files = [
        i for s in ("val", "test") for i in images_of(phantom / f"annotations/{s}.json", [])
    ]
    boxes = [
        sorted(tuple(np.round(lesion["bbox"], 4)) for i in images for lesion in i["lesions"])
        for images in (of_table, of_files)
    ]
    np.testing.assert_allclose(boxes[0], boxes[1], atol=1e-3)
    assert {i["patient"] for i in of_table} == {i["patient"] for i in of_files}


def test_from_annotations_to_lines_that_a_config_takes(run, repository, phantom, tmp_path):
    out = tmp_path / "found.json"
    path = phantom / "annotations/train.json"
    own_options = ("--cfg-options", "train_dataloader.batch_size=2")
    printed = run(path, "--sizes", 3, "--ratios", 2, "--folds", 2, "--out", out, *own_options)
    found = json.loads(out.read_text())
    assert found["options"] == {"train_dataloader.batch_size": 2} and found["split"] == ["train"]
    own, new = (found["overlaps"][name]["all"] for name in ("the config's own", "optimised"))
    assert new["mean"] > own["mean"] > 0.6
    for name in ("the config's own", "optimised", "patients left out"):
        assert f"{found['overlaps'][name]['all']['mean']:.3f}" in printed

    # The line for a config and that for a command line say the same.
    (line,) = re.findall(r"^model = (.*)$", printed, re.M)
    stated = eval(line)["rpn_head"]["anchor_generator"]
    assert stated == {"scales": found["scales"], "ratios": found["ratios"]}
    options = dict(o.split("=") for o in printed.partition("--cfg-options ")[2].split())
    config = load_config(
        str(repository / CONFIG), {name: ast.literal_eval(value) for name, value in options.items()}
    )
    generator = TASK_UTILS.build(config.model.rpn_head.anchor_generator)
    assert generator.num_base_anchors == [6]
    # And the anchors of that config fit as well as was said.
    boxes, _ = boxes_in_training(images_of(path, []), TRANSFORMS.build(resize_of(config)), 0)
    mean = best_overlaps(boxes.sizes, sizes_of(generator)).mean()
    assert mean == pytest.approx(new["mean"], abs=1e-6)


def test_from_the_table_of_lesions_alone(run, phantom, tmp_path):
    """By size as from the annotation files."""
    found = {}
    for path in (phantom / "DL_info.csv", phantom / "annotations/train.json"):
        run(path, "--sizes", 1, "--ratios", 1, "--folds", 2, "--out", tmp_path / "found.json")
        overlaps = json.loads((tmp_path / "found.json").read_text())["overlaps"]["optimised"]
        found[path.suffix] = {group: part["boxes"] for group, part in overlaps.items()}
    assert found[".csv"] == found[".json"] and len(found[".csv"]) > 2


def test_octaves_of_a_generator_give_way():
    own = dict(
        type="mmdet.AnchorGenerator", strides=[8, 16], octave_base_scale=4, scales_per_octave=3,
        ratios=[0.5, 1.0, 2.0],
    )  # fmt: skip
    generator = TASK_UTILS.build(dict(replaced(own, [2.5], [1.0])))
    np.testing.assert_allclose(sizes_of(generator), [[20, 20], [40, 40]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such.json"], "no/such.json does not exist"),
        (["train.json", "--sizes", "0"], "--sizes must be from 1 to"),
        (["train.json", "--folds", "1"], "--folds must be from 2 to"),
        (["train.json", "--split", "val"], "--split is for DL_info.csv"),
        (["train.json", "--folds", "50"], "cannot be split into 50 folds"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(run, phantom, arguments, words):
    if arguments[0] == "train.json":
        arguments = [phantom / "annotations/train.json", *arguments[1:]]
    with pytest.raises(SystemExit, match=words):
        run(*arguments)


def test_a_pipeline_without_the_resize_is_refused():
    config = Config(dict(train_dataloader=dict(dataset=dict(pipeline=[dict(type="Resize")]))))
    with pytest.raises(ValueError, match="0 steps RandomAffineResize"):
        resize_of(config)
