"""VolumeClassifier: its loss and probabilities, and what it shares with the segmentor."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import nn

from mmdet_ext.checkpoint import CheckpointError, save_checkpoint_file
from mmdet_ext.models.classifiers import VolumeClassifier


@MODELS.register_module()
class TinyClassifier(nn.Module):
    """Of images of one channel."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.head(self.pool(torch.relu(self.norm(self.conv(x)))).flatten(1))


def classifier(conv=None, classes=2, seed=0, **options):
    torch.manual_seed(seed)
    network = dict(type="TinyClassifier", num_classes=classes)
    return VolumeClassifier(network, conv and dict(type=conv), **options)


def samples(labels):
    found = [BaseDataElement(metainfo=dict(index=i)) for i in range(len(labels))]
    for sample, label in zip(found, labels):
        sample.label = torch.tensor(label)
    return found


def test_loss_and_probabilities():
    model = classifier("ACSConv").eval()
    volumes = [torch.randn(1, 6, 7, 5) for _ in range(3)]
    logits = model(volumes)
    assert logits.shape == (3, 2)
    truth = samples([1, 0, 1])
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = -(p[0, 1].log() + p[1, 0].log() + p[2, 1].log()) / 3
    torch.testing.assert_close(model(volumes, truth, "loss")["loss_cls"], expected)
    for sample, own in zip(model(volumes, truth, "predict"), p):
        torch.testing.assert_close(sample.probabilities, own)
    with pytest.raises(ValueError, match="mode"):
        model(volumes, truth, "test")


@pytest.mark.parametrize("conv", ["ACSConv", "SliceConv", "I3DConv"])
def test_it_starts_from_a_2d_training_of_other_classes(conv, tmp_path):
    trained = classifier(classes=5, seed=7)
    trained([torch.randn(1, 8, 8)] * 2)
    path = tmp_path / "2d.pth"
    save_checkpoint_file(dict(state_dict=trained.state_dict()), path)
    model = classifier(conv, pretrained=str(path))
    head = model.network.model.head.weight.clone()
    model.init_weights()
    network = model.network.model
    weight = trained.network.conv.weight
    if conv == "I3DConv":
        weight = weight[:, :, None].expand(-1, -1, 3, -1, -1) / 3
    torch.testing.assert_close(network.conv.weight, weight)
    torch.testing.assert_close(network.norm.running_mean, trained.network.norm.running_mean)
    assert network.head.weight.shape == head.shape == (2, 6)

    save_checkpoint_file(dict(state_dict=classifier("I3DConv").state_dict()), path)
    with pytest.raises(CheckpointError, match=r"model\.pretrained=.*2D TinyClassifier"):
        model.init_weights()
