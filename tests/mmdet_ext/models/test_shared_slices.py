"""Stacks that have slices in common: the same features as of stacks written out, and each slice
through the stem once."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from benchmarks.twins import TWINS, config
from mmdet_ext.models import detectors
from mmdet_ext.models.densenet import TruncatedDenseNet3D
from mmdet_ext.models.detectors import KeySliceMaskRCNN
from mmdet_ext.models.shared_slices import SharedSlices

from ..small_detector import ROOT, config_of

NO_FUSION = ROOT / "configs/demo/nofusion_3slice.py"
# Neighbours, a step of two, slices that repeat at an end, one far away, out of order.
UNEVEN = [[0, 1, 2], [2, 3, 4], [0, 0, 1], [6, 2, 5], [4, 5, 5]]


def model_of(fusion=None, **options):
    if fusion:
        options["model.backbone.fusion"] = fusion
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(config_of(path=NO_FUSION, **options).model)
    for module in model.modules():  # statistics that do something
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2)
    return model.eval()


def batch_of(stacks=UNEVEN, thickness=None, size=64):
    slices = torch.randn(max(map(max, stacks)) + 1, 1, size, size) * 60
    mm = [1.0, 5.0, 2.0, 0.7, 3.0][: len(stacks)] if thickness is None else thickness
    return SharedSlices(slices, torch.tensor(stacks), torch.tensor(mm))


def seen_by(module, run):
    """How many slices go into a layer."""
    counts = []
    hook = module.register_forward_pre_hook(
        lambda _, inputs: counts.append(inputs[0].shape[0] * inputs[0].shape[2])
    )
    with torch.no_grad():
        result = run()
    hook.remove()
    return result, sum(counts)


def same(model, batch):
    """Whether both ways agree, and how many slices went through the first and a later layer."""
    first, later = model.backbone.conv0, model.backbone.transition1.conv
    with torch.no_grad():
        (expected,) = model.extract_feat(batch.volumes())
    assert expected.std() > 0
    ((got,), stem) = seen_by(first, lambda: model.extract_feat(batch))
    size = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * size)
    return stem, seen_by(later, lambda: model.extract_feat(batch))[1]


@pytest.mark.parametrize("name", TWINS)
def test_every_operator_gives_the_same_from_fewer_stems(name):
    model = model_of(config(name, 3, TWINS[name].variants[0]))
    assert model.shares_slices
    stem, _ = same(model, batch_of())
    assert stem == 7  # of 15


@pytest.mark.parametrize("stacks", [[[0, 1, 2]], [[0, 0, 0]], [[0, 1, 2], [3, 4, 5]]])
@pytest.mark.parametrize("fusion", ["AlignShiftConv", "SliceConv"])
def test_a_batch_of_one_and_nothing_in_common(fusion, stacks):
    batch = batch_of(stacks)
    stem, _ = same(model_of(dict(type=fusion)), batch)
    assert stem == len(batch.slices)


@pytest.mark.parametrize(
    ("fusion", "thickness", "slices"),
    [
        ("SliceConv", None, 7),
        ("AlignShiftConv", [torch.inf] * 5, 7),
        ("AlignShiftConv", [torch.inf] * 4 + [5.0], 15),
        ("AlignA3DConv", [torch.inf] * 5, 15),
        ("AlignACSConv", [torch.inf] * 5, 7),
        ("TSMConv", [torch.inf] * 5, 15),
    ],
)
def test_without_fusion_the_whole_backbone_is_shared(fusion, thickness, slices):
    batch = batch_of(thickness=thickness)
    stem, later = same(model_of(config(fusion, 3)), batch)
    assert stem == 7
    # Strips of rows and pieces count more than once: what counts is the area.
    _, written_out = seen_by(
        (model := model_of(config(fusion, 3))).backbone.transition1.conv,
        lambda: model.extract_feat(batch.volumes()),
    )
    assert later / written_out == slices / 15


def test_what_does_not_share_takes_stacks_written_out():
    class Custom(KeySliceMaskRCNN):
        pass

    model = model_of()
    assert model.shares_slices
    model.__class__ = Custom
    assert not model.shares_slices
    batch = batch_of()
    images, mm = model.inputs_of(*batch)  # its own extract_feat may know nothing of sharing
    for volume, stack in zip(images, UNEVEN, strict=True):
        assert torch.equal(volume[0], torch.stack([batch.slices[n, 0] for n in stack]))
    assert torch.equal(mm, batch.thickness)

    model = model_of(**{"model.backbone.slices_as_channels": True})
    assert not model.shares_slices
    with torch.no_grad():
        assert torch.equal(model.extract_feat(batch)[0], model.extract_feat(batch.volumes())[0])

    model = model_of()
    model.backbone.norm0.train()  # its result depends on how often a slice comes
    assert not model.shares_slices

    class Other(TruncatedDenseNet3D):
        pass

    model = model_of()
    model.backbone.__class__ = Other
    assert not model.shares_slices


def test_with_gradients_stacks_are_written_out(monkeypatch):
    model, batch = model_of(), batch_of()
    monkeypatch.setattr(detectors, "shared_maps", None)
    assert model.extract_feat(batch)[0].requires_grad


def test_another_number_of_slices_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match="num_slices=3, the volume has 2 slices"):
        model_of().extract_feat(batch_of([[0, 1]]))
