"""Sliding windows against a plain loop that averages, and the segmentor that predicts by them."""

import importlib.util

import pytest
import torch
from mmengine.structures import BaseDataElement

from deeplesion.errors import UserError
from mmdet_ext.models.segmentors import VolumeSegmentor
from mmdet_ext.models.sliding_windows import SlidingWindowSegmentor, slide

needs_monai = pytest.mark.skipif(
    importlib.util.find_spec("monai") is None, reason="needs monai, the extra [volumes]"
)


def starts(size, window, step):
    """Every step, and the last one so that it ends with the volume."""
    found = list(range(0, max(size - window, 0), step))
    return [*found, max(size - window, 0)]


def looped(network, volume, window, step):
    """Mean over windows, voxel by voxel of a count; beyond a small volume are zeros."""
    before = [max(w - s, 0) // 2 for w, s in zip(window, volume.shape[1:])]
    size = [max(w, s) for w, s in zip(window, volume.shape[1:])]
    padded = torch.zeros(1, *size)
    inner = tuple(slice(b, b + s) for b, s in zip(before, volume.shape[1:]))
    padded[(slice(None), *inner)] = volume
    total, count = torch.zeros(2, *size), torch.zeros(size)
    for z in starts(size[0], window[0], step[0]):
        for y in starts(size[1], window[1], step[1]):
            for x in starts(size[2], window[2], step[2]):
                box = (slice(z, z + window[0]), slice(y, y + window[1]), slice(x, x + window[2]))
                total[(slice(None), *box)] += network(padded[(slice(None), *box)][None])[0].softmax(
                    0
                )
                count[box] += 1
    return (total / count)[(slice(None), *inner)]


def network(x):
    """Two classes; what it says of a voxel depends on where in the window that is."""
    position = torch.arange(x[0, 0].numel()).reshape(x.shape[2:]) / x[0, 0].numel()
    return torch.cat([x * position, (x + x.roll(1, 2)).tanh()], dim=1)


@needs_monai
@pytest.mark.parametrize(
    "size, window, step",
    [
        ((30, 8, 8), (16, 8, 8), (6, 8, 8)),  # the last window is moved back
        ((28, 8, 8), (16, 8, 8), (6, 8, 8)),  # it is not: 28 = 16 + 2 * 6
        ((9, 8, 8), (16, 8, 8), (6, 8, 8)),  # shorter than a window
        ((16, 8, 8), (16, 8, 8), (6, 8, 8)),  # as long
        ((17, 5, 9), (8, 6, 7), (3, 5, 7)),  # all axes, one of them padded
        ((40, 4, 4), (10, 4, 4), (7, 4, 4)),  # a fraction that no float holds
        ((49, 4, 4), (48, 4, 4), (10, 4, 4)),
        ((12, 4, 4), (4, 4, 4), (4, 4, 4)),  # no overlap
        ((7, 4, 4), (4, 4, 4), (1, 4, 4)),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_are_averaged_as_in_a_loop(size, window, step, batch):
    torch.manual_seed(0)
    volume = torch.randn(1, *size)
    found = slide(network, volume, window, step, batch)
    torch.testing.assert_close(found, looped(network, volume, window, step))
    torch.testing.assert_close(found.sum(0), torch.ones(size))


@needs_monai
def test_windows_of_the_paper_begin_every_24_slices():
    seen = []

    def note(x):
        seen.append(int(x[0, 0, 0, 0, 0]))
        assert x.shape == (1, 1, 64, 4, 4)
        return torch.cat([x, x], 1)

    volume = torch.arange(150.0)[None, :, None, None].expand(1, 150, 4, 4)
    slide(note, volume, (64, 4, 4), (24, 4, 4))
    assert seen == [0, 24, 48, 72, 86]


WINDOWS = dict(window=(8, 8, 8), step=(4, 8, 8), batch=2)
OPTIONS = dict(
    network=dict(type="ShapesUNet", num_classes=3), fusion=dict(type="ACSConv"),
    test_cfg=WINDOWS,
)  # fmt: skip


@needs_monai
@torch.no_grad()
def test_the_segmentor_predicts_whole_volumes_of_any_size():
    torch.manual_seed(1)
    model = SlidingWindowSegmentor(**OPTIONS).eval()
    volumes = [torch.randn(1, 14, 8, 8), torch.randn(1, 5, 7, 8)]
    samples = [BaseDataElement(metainfo=dict(index=i)) for i in range(2)]
    for sample, volume in zip(model(volumes, samples, "predict"), volumes, strict=True):
        assert sample.prediction.dtype == torch.uint8
        expected = slide(model.network, volume, (8, 8, 8), (4, 8, 8)).argmax(0)
        torch.testing.assert_close(sample.prediction.long(), expected)
    # Of one window, what the segmentor of crops predicts.
    plain = VolumeSegmentor(OPTIONS["network"], OPTIONS["fusion"]).eval()
    plain.load_state_dict(model.state_dict())
    volume = [torch.randn(1, 8, 8, 8)]
    for mode in ("predict", "loss", "tensor"):
        samples = [BaseDataElement(labels=torch.randint(3, (8, 8, 8)))]
        one, other = (m(volume, [samples[0].clone()], mode) for m in (model, plain))
        if mode == "predict":
            one, other = one[0].prediction, other[0].prediction
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(step=(9, 8, 8)), "step must be from 1"),
        (dict(step=(0, 8, 8)), "step must be from 1"),
        (dict(window=(8, 8)), "depth, height, width"),
        (dict(batch=0), "batch from 1"),
        (dict(overlap=0.5), "got also overlap"),
    ],
)
@needs_monai
def test_options_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowSegmentor(**{**OPTIONS, "test_cfg": WINDOWS | wrong})


def test_without_monai_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("mmdet_ext.models.sliding_windows.find_spec", lambda name: None)
    with pytest.raises(UserError, match="need monai: pip install monai"):
        SlidingWindowSegmentor(**OPTIONS)
