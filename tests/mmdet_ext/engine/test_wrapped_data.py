"""Data sets within another one are refused before anything is read or written."""

import pytest

from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.run import load_config, train
from mmdet_ext.engine.run import test as run_test

OWN = """
_base_ = {base!r}
_data = _base_.{split}_dataloader.dataset
{split}_dataloader = dict(dataset=dict(_delete_=True, {wrapper}))
"""
JOINED = "type='ConcatDataset', datasets=[_data, dict(_data, ann_file='annotations/val.json')]"


@pytest.fixture
def own(repository, tmp_path):
    """A config of one's own over the demo's; its data is not there."""
    base = str(repository / "configs/demo/alignshift_3slice.py")

    def write(split, wrapper):
        (tmp_path / "own.py").write_text(OWN.format(base=base, split=split, wrapper=wrapper))
        return load_config(str(tmp_path / "own.py"), work_dir=str(tmp_path / "work"))

    yield write
    assert not (tmp_path / "work").exists()


def test_joined_data_sets_are_answered_with_the_list_of_files(own):
    """Failed before: AttributeError of a list without `get`, in a hook."""
    said = r"train_dataloader.dataset is a ConcatDataset, .* ann_file=\['annotations/train.json', "
    with pytest.raises(ConfigError, match=said):
        train(own("train", JOINED))


@pytest.mark.parametrize(
    "wrapper, said",
    [
        ("type='RepeatDataset', times=2, dataset=_data", "RepeatDataset, .* more of train_cfg"),
        ("type='ClassBalancedDataset', oversample_thr=0.1, dataset=_data", "take the data set"),
        (
            f"type='MultiImageMixDataset', pipeline=[], dataset=dict({JOINED})",
            r"set\.dataset is a C",
        ),
    ],
)
def test_other_wrappers_know_no_sample_keys_either(own, wrapper, said):
    with pytest.raises(ConfigError, match=said):
        train(own("train", wrapper))


def test_a_table_is_of_one_file(own):
    """Failed before: AttributeError of a list without `get`, too."""
    said = "_dataloader.dataset is a ConcatDataset: a table is of one annotation file"
    with pytest.raises(ConfigError, match=f"val{said}"):
        train(own("val", JOINED))
    with pytest.raises(ConfigError, match=f"test{said}"):
        run_test(own("test", JOINED), "epoch_1.pth")
