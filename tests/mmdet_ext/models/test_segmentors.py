"""VolumeSegmentor and its loss: against a loop over classes; what is transferred, and how it
begins."""

import math

import pytest
import torch
from mmengine.structures import BaseDataElement

from deeplesion.errors import MissingDataError, UserError
from mmdet_ext.checkpoint import CheckpointError, save_checkpoint_file
from mmdet_ext.models.losses import SoftDiceLoss
from mmdet_ext.models.segmentors import VolumeSegmentor


def plain_loss(logits, labels, smooth):
    p, loss = logits.double().softmax(1), 0.0
    classes = logits.shape[1]
    for c in range(classes):
        t = (labels == c).double()
        if t.sum() > 0:
            loss += 1 - (2 * (p[:, c] * t).sum() + smooth) / (p[:, c].sum() + t.sum() + smooth)
    return loss / classes


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (1, 3), (2,)])
def test_the_loss_is_a_loop_over_the_classes_that_are_there(present):
    torch.manual_seed(1)
    logits = torch.randn(2, 4, 3, 5, 4, requires_grad=True)
    labels = torch.tensor(present)[torch.randint(len(present), (2, 3, 5, 4))].to(torch.uint8)
    loss = SoftDiceLoss(0.01)(logits, labels)
    torch.testing.assert_close(
        loss.double(), plain_loss(logits, labels, 0.01).detach(), rtol=1e-5, atol=0
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(plain_loss(logits, labels, 0.01), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


def test_a_perfect_prediction_costs_nothing():
    labels = torch.tensor([[0, 1, 2, 1]])
    logits = 50 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    assert SoftDiceLoss()(logits, labels).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("smooth", [0, -1, math.nan])
def test_the_loss_needs_smoothing(smooth):
    with pytest.raises(ValueError, match="smooth"):
        SoftDiceLoss(smooth)


def test_labels_that_the_network_cannot_give_are_refused():
    logits, labels = torch.zeros(2, 3, 4, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    labels[1, 2, 3, 0] = 3
    with pytest.raises(UserError, match=r"up to 3, .* classes 0 to 2: .*num_classes"):
        SoftDiceLoss()(logits, labels)
    with pytest.raises(UserError, match=r"gives \(1, 1, 1\) for labels of \(4, 4, 4\)"):
        SoftDiceLoss()(logits[..., :1, :1, :1], labels)


def segmentor(conv=None, classes=6, **options):
    torch.manual_seed(options.pop("seed", 0))
    network = dict(type="ShapesUNet", num_classes=classes)
    return VolumeSegmentor(network, conv and dict(type=conv), **options)


@pytest.fixture
def checkpoint(tmp_path):
    """A 2D training's, with statistics of BatchNorm of its own."""
    model = segmentor(classes=3, seed=7)
    for _ in range(2):
        model([torch.randn(1, 8, 8)])
    path = tmp_path / "2d.pth"
    save_checkpoint_file(dict(state_dict=model.state_dict()), path)
    return path


@pytest.mark.parametrize("conv", ["ACSConv", "SliceConv"])
def test_all_but_the_head_is_transferred(conv, checkpoint):
    model = segmentor(conv, pretrained=str(checkpoint))
    model.init_weights()
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    state = model.state_dict()
    assert {n.replace("network.model.", "network.") for n in state} == trained.keys()
    for name, weight in state.items():
        source = trained[name.replace("network.model.", "network.")]
        if ".head." not in name:
            torch.testing.assert_close(weight, source, rtol=0, atol=0)
    assert state["network.model.head.weight"].shape == (6, 32, 1, 1)


def test_plain_3d_gets_inflated_kernels(checkpoint):
    model = segmentor("I3DConv", pretrained=str(checkpoint))
    model.init_weights()
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    weight = model.state_dict()["network.model.decoder.3.weight"]
    source = trained["network.decoder.3.weight"]
    assert weight.shape == (32, 64, 3, 3, 3)
    for tap in range(3):
        torch.testing.assert_close(weight[:, :, tap], source / 3)


def test_kaiming_counts_all_taps():
    for conv, taps in ((None, 9), ("I3DConv", 27)):
        model = segmentor(conv, init="kaiming")
        before = model.network.state_dict() if conv is None else model.network.model.state_dict()
        before = before["decoder.0.weight"].clone()
        model.init_weights()
        network = model.network if conv is None else model.network.model
        weight = network.decoder[0].weight
        bound = math.sqrt(2) * math.sqrt(3 / (192 * taps))
        assert weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert weight.abs().max() <= bound
        assert before.abs().max() < bound * 0.6  # torch's own: 1 / sqrt(fan-in)
    model, other = segmentor("ACSConv"), segmentor("ACSConv")
    model.init_weights()
    for one, same in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(one, same, rtol=0, atol=0)


def test_it_predicts_the_likeliest_class():
    model = segmentor("ACSConv").eval()
    volumes = [torch.randn(1, 8, 8, 4) for _ in range(2)]
    logits = model(volumes)
    samples = [BaseDataElement(metainfo=dict(index=i)) for i in range(2)]
    for sample, expected in zip(model(volumes, samples, "predict"), logits):
        assert sample.prediction.dtype == torch.uint8
        torch.testing.assert_close(sample.prediction.long(), expected.argmax(0))
        assert sample.prediction.shape == (8, 8, 4)
    for sample in samples:
        sample.labels = torch.zeros(8, 8, 4, dtype=torch.uint8)
    expected = plain_loss(logits, torch.zeros(2, 8, 8, 4), 0.01).float()
    torch.testing.assert_close(model(volumes, samples, "loss")["loss_dice"], expected)


def test_nan_is_no_class():
    model = segmentor("ACSConv").eval()
    model.network.model.head.bias.data[3] = math.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        model([torch.randn(1, 8, 8, 4)], [BaseDataElement()], "predict")


def test_what_cannot_be_transferred_is_refused(tmp_path, checkpoint):
    with pytest.raises(MissingDataError):
        segmentor("ACSConv", pretrained=str(tmp_path / "none.pth")).init_weights()
    other = tmp_path / "other.pth"
    save_checkpoint_file(dict(state_dict=segmentor("I3DConv").state_dict()), other)
    with pytest.raises(CheckpointError, match=r"model\.pretrained=.*2D ShapesUNet"):
        segmentor("ACSConv", pretrained=str(other)).init_weights()
    with pytest.raises(ValueError, match="init"):
        segmentor(init="zeros")
    with pytest.raises(ValueError, match="mode"):
        segmentor()([torch.zeros(1, 8, 8)], mode="test")
