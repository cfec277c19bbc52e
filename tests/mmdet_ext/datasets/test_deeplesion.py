"""DeepLesionDataset, its sampler and the pixel-centre convention."""

import json
import shutil

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.data.prepare import prepare
from deeplesion.data.slice_cache import fill_cache
from deeplesion.errors import DataError, MissingDataError, message_of
from mmdet_ext.datasets.deeplesion import DeepLesionDataset
from mmdet_ext.datasets.sampler import EpochSampler, SampleKey
from mmdet_ext.engine.run_card import counts, masks_of, published

STACK = dict(num_slices=3, policy="keep_thick")
PIPELINE = [
    dict(type="LoadCTSlices"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomAffineResize", size=128, prob=0, flip_prob=0, box_from="corners"),
    dict(type="PackCTInputs"),
]


@pytest.fixture(autouse=True)
def _scope():
    from mmengine.registry import DefaultScope, init_default_scope

    import mmdet_ext.datasets.transforms  # noqa: F401

    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")


def dataset(root, split="train", pipeline=PIPELINE, stack=STACK, folder="annotations", **options):
    return DeepLesionDataset(
        stack=stack,
        data_root=str(root),
        ann_file=f"{folder}/{split}.json",
        data_prefix=dict(img="Images_png"),
        pipeline=pipeline,
        **options,
    )


def test_every_lesion_of_the_file_arrives_half_a_pixel_further(phantom):
    content = json.loads((phantom / "annotations/train.json").read_text())
    data = dataset(phantom)
    assert len(data) == len(content["images"])
    for i, image in enumerate(content["images"]):
        sample = data[i]["data_samples"]
        expected = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array([a["bbox"] for a in expected])
        boxes[:, 2:] += boxes[:, :2]
        got = sample.gt_instances.bboxes.tensor.numpy()
        np.testing.assert_allclose(got, boxes + PIXEL_CENTRE, atol=1e-4)
        for mask, annotation in zip(sample.gt_instances.masks.masks, expected):
            np.testing.assert_array_equal(mask, coco_mask.decode(annotation["segmentation"]))


@pytest.mark.parametrize(
    "policy, told", [("keep_thick", {1.0: 2.0, 5.0: 5.0}), ("normalize", {1.0: 2.0, 5.0: 2.0})]
)
def test_thickness_is_that_of_the_stack(phantom, policy, told):
    """Thin slices are resampled to 2 mm by either policy, thick ones by 'normalize' alone."""
    data = dataset(phantom, stack=dict(num_slices=3, policy=policy))
    samples = [data[i]["data_samples"] for i in range(len(data))]
    assert {sample.file_thickness_mm for sample in samples} == set(told)
    assert all(sample.thickness_mm == told[sample.file_thickness_mm] for sample in samples)


def test_training_boxes_are_the_extent_of_the_recist_ends_and_five_pixels(phantom):
    """As DeepLesion defines a box: without augmentation it is the box of the file."""
    content = json.loads((phantom / "annotations/train.json").read_text())
    (size,) = {(image["height"], image["width"]) for image in content["images"]}
    resize = dict(type="RandomAffineResize", size=size, augment=False)
    data = dataset(phantom, pipeline=[*PIPELINE[:2], resize, PIPELINE[3]])
    transposed_differ = 0
    for i, image in enumerate(content["images"]):
        expected = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        got = data[i]["data_samples"].gt_instances.bboxes.tensor.numpy()
        assert len(got) == len(expected)
        for box, annotation in zip(got, expected):
            x, y, width, height = annotation["bbox"]
            of_file = np.array([x, y, x + width, y + height]) + 0.5
            np.testing.assert_allclose(box, of_file.clip(0, size[0]), atol=0.01)
            ends = np.reshape(annotation["recist"], (4, 2))
            extent = np.concatenate([ends.min(0) - 5, ends.max(0) + 5]) + 0.5
            np.testing.assert_allclose(box, extent.clip(0, size[0]), atol=1e-3)
            transposed_differ += abs(box[[1, 0, 3, 2]] - box).max() > 10
    assert transposed_differ > 3, "x and y could be swapped unseen"


def test_masks_lie_inside_their_boxes_and_reach_to_their_recist_ends(phantom):
    data = dataset(phantom)
    for i in range(len(data)):
        sample = data[i]["data_samples"]
        instances = sample.gt_instances
        for box, mask, lesion in zip(
            instances.bboxes.tensor.numpy(), instances.masks.masks, sample.lesions, strict=True
        ):
            rows, columns = np.nonzero(mask)
            assert columns.min() + 0.5 >= box[0] - 0.5 and columns.max() + 0.5 <= box[2] + 0.5
            assert rows.min() + 0.5 >= box[1] - 0.5 and rows.max() + 0.5 <= box[3] + 0.5
            for x, y in np.reshape(lesion["recist"], (4, 2)):  # of pixel centres, as the mask's
                assert np.hypot(columns - x, rows - y).min() < 1.5, "more than 1 px beside it"


def several(root, *files, **options):
    files = [f"annotations/{name}.json" for name in files]
    return DeepLesionDataset(
        stack=STACK,
        data_root=str(root),
        ann_file=files,
        data_prefix=dict(img="Images_png"),
        pipeline=PIPELINE,
        **options,
    )


def test_several_files_are_one_data_set_one_after_the_other(phantom):
    both = several(phantom, "train", "val")
    parts = [dataset(phantom, split) for split in ("train", "val")]
    assert len(both) == len(parts[0]) + len(parts[1])
    expected = [part.get_data_info(i) for part in parts for i in range(len(part))]
    found = [both.get_data_info(i) for i in range(len(both))]
    for key in ("file_name", "img_path", "lesions", "instances", "slice_range"):
        assert [sample[key] for sample in found] == [sample[key] for sample in expected]
    assert len({sample["img_id"] for sample in found}) == len(both)
    for index in (0, len(parts[0]), len(both) - 1):  # of either file, by a sampler's key as well
        part, i = (parts[0], index) if index < len(parts[0]) else (parts[1], index - len(parts[0]))
        assert (both[SampleKey(0, 0, index)]["inputs"] == part[i]["inputs"]).all()
    assert both.metainfo["masks"] == parts[0].metainfo["masks"]
    kept = several(phantom, "train", "val", filter_cfg=dict(filter_empty_gt=True))
    assert len(kept) == sum(bool(sample["instances"]) for sample in found)
    facts = counts(both)
    assert facts["lesions"] == sum(len(sample["lesions"]) for sample in expected)
    assert published(both, "train") == 22_478 + 4_791
    assert published(parts[0], "train") == 22_478
    assert facts["source"] == f"{phantom}/annotations/train.json and {phantom}/annotations/val.json"


def test_several_files_are_for_training_and_share_no_key_slice(phantom):
    with pytest.raises(DataError, match=r"train.json and .*train.json share \d+ key slices, such"):
        several(phantom, "train", "train")
    with pytest.raises(ValueError, match="several files are for training"):
        several(phantom, "train", "val", test_mode=True)
    with pytest.raises(ValueError, match="there must be one at least"):
        several(phantom)
    with pytest.raises(MissingDataError, match=r"none.json does not exist"):
        several(phantom, "train", "none")


def test_masks_of_two_kinds_are_told(phantom, tmp_path):
    (tmp_path / "annotations").mkdir()
    for split, kind in (("train", "grabcut"), ("val", "ellipse")):
        content = json.loads((phantom / f"annotations/{split}.json").read_text())
        content["info"]["masks"] = kind
        (tmp_path / f"annotations/{split}.json").write_text(json.dumps(content))
    (tmp_path / "Images_png").symlink_to(phantom / "Images_png")
    assert masks_of(several(tmp_path, "train", "val")) == "grabcut and ellipse"
    content["info"].pop("masks")
    (tmp_path / "annotations/val.json").write_text(json.dumps(content))
    both = several(tmp_path, "train", "val")
    assert masks_of(both).startswith("of annotations/; the annotation file does not say")


def test_sampler_keys_name_seed_epoch_and_sample(phantom):
    data = dataset(phantom)
    sampler = EpochSampler(data, shuffle=True, seed=5)
    sampler.set_epoch(0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert {k.index for k in first} == {k.index for k in second} == set(range(len(data)))
    assert {k.epoch for k in first} == {0} and {k.epoch for k in second} == {1}
    assert {k.seed for k in first} == {5}


def test_two_epochs_augment_differently_and_one_repeats(phantom):
    pipeline = [*PIPELINE[:2], dict(type="RandomAffineResize", size=128, prob=1), PIPELINE[3]]
    data = dataset(phantom, pipeline=pipeline)
    key = SampleKey(0, 0, 1)
    first, again = data[key]["inputs"], data[key]["inputs"]
    assert (first == again).all()
    assert (first != data[key._replace(epoch=1)]["inputs"]).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_mmdets_transforms_draw_by_epoch_and_sample_too(phantom, workers):
    """RandomFlip takes its numbers from numpy's global generator."""
    pipeline = [
        dict(type="LoadCTSlices"),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PackCTInputs", meta_keys=("flip",)),
    ]
    data = dataset(phantom, pipeline=pipeline)
    sampler = EpochSampler(data, shuffle=False, seed=0)
    flips = []
    for sampler.epoch in range(4):
        loader = DataLoader(data, 2, sampler=sampler, num_workers=workers, collate_fn=list)
        flips.append([sample["data_samples"].flip for batch in loader for sample in batch])
    expected = [[data[key]["data_samples"].flip for key in sampler] for sampler.epoch in range(4)]
    assert flips == expected
    assert len({tuple(epoch) for epoch in flips}) == 4, "epochs are flipped alike"


def test_a_resumed_sampler_goes_on_where_it_was(phantom):
    data = range(7)
    sampler = EpochSampler(data, shuffle=True, seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.start = 4
    assert list(sampler) == whole[4:] and len(sampler) == 7
    sampler.start = 7
    assert list(sampler) == []


def test_missing_annotations_say_how_to_get_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prepare_data.py.*make_phantom.py"):
        dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"DEEPLESION_ROOT --masks released`"):
        dataset(tmp_path, folder="annotations_released")


def test_empty_split_is_an_error(phantom, tmp_path):
    content = json.loads((phantom / "annotations/train.json").read_text())
    content["images"] = content["annotations"] = []
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"train.json holds no key slices"):
        dataset(tmp_path)


def test_annotations_are_checked_at_load(phantom, tmp_path):
    content = json.loads((phantom / "annotations/train.json").read_text())
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations/train.json"
    path.write_text(json.dumps({**content, "annotations": []}))
    assert len(dataset(tmp_path, test_mode=True)) == len(content["images"])
    with pytest.raises(DataError, match=r"train.json holds no lesions"):
        dataset(tmp_path)
    content["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"annotation 1 .*bbox"):
        dataset(tmp_path, test_mode=True)


# Where slices and annotations lie


@pytest.fixture(scope="module")
def as_usual(phantom):
    data = dataset(phantom)
    return {data[i]["data_samples"].file_name: data[i]["inputs"] for i in range(len(data))}


def check_as_usual(data, as_usual):
    assert len(data) == len(as_usual)
    for i in range(len(data)):
        sample = data[i]
        assert (sample["inputs"] == as_usual[sample["data_samples"].file_name]).all()


def bare_copy(phantom, root):
    shutil.copytree(phantom, root, ignore=shutil.ignore_patterns("annotations", "phantom_truth"))
    return root


def test_training_finds_series_where_prepare_found_them(phantom, tmp_path, as_usual, monkeypatch):
    root = bare_copy(phantom, tmp_path / "data")
    for i, folder in enumerate(sorted((root / "Images_png").iterdir())[::2]):
        place = root / f"Images_png_{i % 2}" / "Images_png"
        place.mkdir(parents=True, exist_ok=True)
        folder.rename(place / folder.name)
    prepare(root, workers=1)
    check_as_usual(dataset(root), as_usual)
    loader = DataLoader(dataset(root), batch_size=None, num_workers=1)
    assert len(list(loader)) == len(as_usual)
    moved = root.rename(tmp_path / "moved")  # what is recorded is relative
    check_as_usual(dataset(moved), as_usual)
    monkeypatch.chdir(tmp_path)
    check_as_usual(dataset("moved"), as_usual)


def test_training_on_data_prepared_elsewhere(phantom, tmp_path, as_usual):
    root = bare_copy(phantom, tmp_path / "share")
    prepare(root, workers=1, out=tmp_path / "own")
    check_as_usual(dataset(tmp_path / "own"), as_usual)
    fill_cache(tmp_path / "own", 3, workers=1)
    cached = dataset(tmp_path / "own", cache="slice_cache")
    assert cached.cache
    check_as_usual(cached, as_usual)


def test_how_many_key_slices_there_should_be_reaches_the_metric(phantom):
    content = json.loads((phantom / "annotations/test.json").read_text())
    data = dataset(phantom, "test", test_mode=True)
    assert data.metainfo["table_key_slices"] == len(content["images"])


# Files of others


def foreign(phantom, tmp_path):
    """A data set of single images with boxes: no masks, patients, spacing or neighbours."""
    content = json.loads((phantom / "annotations/train.json").read_text())
    (tmp_path / "Images_png").mkdir()
    (tmp_path / "annotations").mkdir()
    for image in content["images"]:
        name = image["file_name"].replace("/", "_")
        shutil.copy(phantom / "Images_png" / image["file_name"], tmp_path / "Images_png" / name)
        image["file_name"] = name
    fields = ("id", "file_name", "height", "width")
    plain = dict(
        images=[{key: image[key] for key in fields} for image in content["images"]],
        annotations=[
            {key: a[key] for key in ("id", "image_id", "category_id", "bbox")}
            for a in content["annotations"]
        ],
        categories=[dict(id=1, name="nodule")],
    )
    (tmp_path / "annotations/train.json").write_text(json.dumps(plain))
    return plain


def test_boxes_alone_can_be_learnt_from(phantom, tmp_path):
    plain = foreign(phantom, tmp_path)
    pipeline = [PIPELINE[0], dict(type="LoadAnnotations", with_bbox=True), *PIPELINE[2:]]
    data = dataset(tmp_path, pipeline=pipeline)
    assert len(data) == len(plain["images"])
    sample = data[0]
    assert len(sample["data_samples"].gt_instances.bboxes) > 0
    assert sample["data_samples"].thickness_mm == np.inf  # the key slice alone, repeated
    assert (sample["inputs"] == sample["inputs"][:, :1]).all()


def test_a_mask_head_needs_masks(phantom, tmp_path):
    foreign(phantom, tmp_path)
    with pytest.raises(
        DataError, match=r"annotations have no mask.*mask_head=None.*with_mask=False"
    ):
        dataset(tmp_path)


# Slices that cannot be read


@pytest.fixture
def damaged(phantom, tmp_path):
    """A copy of the phantom in which the first key slice of the training split is cut short."""
    root = tmp_path / "DeepLesion"
    shutil.copytree(phantom, root)
    name = json.loads((root / "annotations/train.json").read_text())["images"][0]["file_name"]
    path = root / "Images_png" / name
    path.write_bytes(path.read_bytes()[:300])
    return root, name


def test_a_bad_slice_stops_with_file_and_key_slice_through_workers(damaged):
    root, name = damaged
    loader = DataLoader(dataset(root), batch_size=None, num_workers=1)
    with pytest.raises(DataError) as stopped:
        list(loader)
    message = message_of(stopped.value)
    assert message.startswith(f"cannot read {root}/Images_png/{name}: the PNG is truncated")
    assert message.endswith(f"(while loading the stack around {name})")


def test_a_bad_slice_is_logged_once_and_replaced(damaged, monkeypatch, tmp_path):
    root, name = damaged
    log = tmp_path / "log"  # workers write to it

    def note(message, *_):
        if "slices come from" not in message:
            with open(log, "a") as file:
                file.write(f"{message}\n")

    monkeypatch.setattr("mmdet_ext.datasets.deeplesion.print_log", note)
    data = dataset(root, on_bad_slice="skip")
    sampler = EpochSampler(data, shuffle=True, seed=5)
    loader = DataLoader(
        data, batch_size=None, num_workers=2, sampler=sampler, persistent_workers=True
    )
    names = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        names += [sample["data_samples"].file_name for sample in loader]
    assert name not in names and len(names) == 3 * len(data)
    (line,) = log.read_text().splitlines()
    assert line.startswith(f"cannot read {root}/Images_png/{name}")
    assert "on_bad_slice='skip'" in line and line.endswith(f"1 of {len(data)} key slices so far")


def test_what_replaces_a_bad_slice_is_a_function_of_the_key(damaged):
    root, _ = damaged
    data = dataset(root, on_bad_slice="skip")
    keys = [SampleKey(seed, epoch, 0) for seed in (0, 1) for epoch in range(8)]
    first, again = ([data[key] for key in keys] for _ in range(2))
    for one, other in zip(first, again):
        assert one["data_samples"].file_name == other["data_samples"].file_name
        assert (one["inputs"] == other["inputs"]).all()
    assert len({sample["data_samples"].file_name for sample in first}) > 2


def test_too_many_bad_slices_are_an_error(damaged):
    root, _ = damaged
    shutil.rmtree(root / "Images_png")
    with pytest.raises(DataError, match="10 bad samples in a row, the last: slice not found"):
        dataset(root, on_bad_slice="skip")[0]


def test_skipping_is_for_training(phantom):
    with pytest.raises(ValueError, match="'skip' is for training"):
        dataset(phantom, on_bad_slice="skip", test_mode=True)
    with pytest.raises(ValueError, match="must be 'stop' or 'skip', got 'ignore'"):
        dataset(phantom, on_bad_slice="ignore")


@pytest.mark.parametrize(
    "stack, message",
    [
        (dict(num_slices=4), "num_slices must be odd"),
        (dict(num_slices=3, policy="thin"), "policy must be one of"),
        (dict(num_slices=3, target_mm=0), "target_mm must be"),
    ],
)
def test_bad_stacks_are_refused_at_once(phantom, stack, message):
    with pytest.raises(ValueError, match=message):
        dataset(phantom, stack=stack)
