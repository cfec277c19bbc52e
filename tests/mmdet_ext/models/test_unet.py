"""The proof of concept's U-Net: its size in 2D and 3D, its maps, how it starts."""

import pytest
import torch

from mmdet_ext.convert import convert_to_3d
from mmdet_ext.models.unet import ShapesUNet, kaiming_uniform


def size(network):
    return sum(p.numel() for p in network.parameters())


def test_parameters_are_those_of_the_paper():
    assert size(ShapesUNet(6)) == 389_286 and size(ShapesUNet(3)) == 389_187
    for conv, parameters in (
        ("ACSConv", 389_286), ("SliceConv", 389_286), ("I3DConv", 1_164_582),
    ):  # fmt: skip
        network = convert_to_3d(ShapesUNet(6), conv, depth="isotropic")
        assert size(network) == parameters
        assert network(torch.zeros(1, 1, 4, 8, 12)).shape == (1, 6, 4, 8, 12)
    assert ShapesUNet(3)(torch.zeros(2, 1, 12, 16)).shape == (2, 3, 12, 16)


def test_the_inner_map_is_enlarged_as_is_said():
    torch.manual_seed(0)
    network = ShapesUNet(3).eval()
    x = torch.randn(1, 1, 16, 16)
    smooth = network(x)
    network.inner_mode = "nearest"
    assert not torch.allclose(network(x), smooth)
    network.head = torch.nn.Identity()
    assert network(x).shape == (1, 32, 16, 16)


@pytest.mark.parametrize("isotropic", [False, True])
def test_kaiming_uniform(isotropic):
    torch.manual_seed(0)
    network = ShapesUNet(6)
    if isotropic:
        network = convert_to_3d(network, "I3DConv", depth="isotropic")
    biases = {k: p.clone() for k, p in network.named_parameters() if p.ndim == 1}
    kaiming_uniform(network)
    for name, parameter in network.named_parameters():
        parameter = parameter.detach()
        if parameter.ndim == 1:
            assert torch.equal(parameter, biases[name])
            continue
        bound = (6 / parameter[0].numel()) ** 0.5
        assert parameter.abs().max() <= bound
        if parameter.numel() > 1000:
            assert parameter.abs().max() > 0.98 * bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
