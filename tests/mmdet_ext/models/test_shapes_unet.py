"""The U-Net of the proof of concept: its size, its layers by plain functions, and it in 3D."""

import pytest
import torch
import torch.nn.functional as F

from mmdet_ext.convert import convert_to_3d
from mmdet_ext.models.shapes_unet import ShapesUNet


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.fixture
def trained():
    """As after training: statistics and affine parameters of BatchNorm are not those it begins
    with."""
    torch.manual_seed(0)
    network = ShapesUNet(6).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.uniform_(-0.5, 0.5)
    return network


def test_it_has_the_papers_number_of_parameters():
    assert parameters(ShapesUNet(6)) == 389_286
    assert parameters(ShapesUNet(3)) == 389_187


@pytest.mark.parametrize(
    "conv, expected",
    [("ACSConv", 389_286), ("SliceConv", 389_286), ("I3DConv", 1_164_582)],
)
@torch.no_grad()
def test_volumes_have_the_papers_number_of_parameters(conv, expected, trained):
    network = convert_to_3d(trained, conv, depth="isotropic").eval()
    assert parameters(network) == expected
    volumes = torch.randn(2, 1, 8, 12, 4)
    features = network(volumes, features=True)
    assert features.shape == (2, 32, 8, 12, 4)
    logits = network(volumes)
    assert logits.shape == (2, 6, 8, 12, 4)
    weight, bias = trained.head.weight[..., None], trained.head.bias
    torch.testing.assert_close(F.conv3d(features, weight, bias), logits)


@torch.no_grad()
@pytest.mark.parametrize("inner_mode", ["bilinear", "nearest"])
def test_its_layers_are_those_of_the_paper(trained, inner_mode):
    state = trained.state_dict()
    network = ShapesUNet(6, inner_mode).eval()
    network.load_state_dict(state)

    def layers(x, name):
        for conv, norm in ((0, 1), (3, 4)):
            x = F.conv2d(x, state[f"{name}.{conv}.weight"], state[f"{name}.{conv}.bias"], padding=1)
            mean, var = (state[f"{name}.{norm}.running_{s}"] for s in ("mean", "var"))
            x = F.batch_norm(
                x, mean, var, state[f"{name}.{norm}.weight"], state[f"{name}.{norm}.bias"]
            )
            x = x.relu()
        return x

    x = torch.randn(2, 1, 12, 16)
    first = F.max_pool2d(layers(x, "encoder1"), 2)
    assert first.shape == (2, 64, 6, 8)
    second = F.max_pool2d(layers(first, "encoder2"), 2)
    assert second.shape == (2, 128, 3, 4)
    up = F.interpolate(second, scale_factor=2, mode=inner_mode)
    last = layers(torch.cat([first, up], 1), "decoder")
    last = F.interpolate(last, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(x, features=True), last)
    torch.testing.assert_close(network(x), F.conv2d(last, state["head.weight"], state["head.bias"]))


@torch.no_grad()
def test_without_fusion_it_pools_and_upsamples_along_depth_alone(trained):
    """2.5D on a volume of equal slices is the image's result in every slice."""
    network = convert_to_3d(trained, "SliceConv", depth="isotropic").eval()
    image = torch.randn(1, 1, 8, 8)
    volume = image[:, :, None].repeat(1, 1, 12, 1, 1)
    expected = trained(image)[:, :, None].repeat(1, 1, 12, 1, 1)
    torch.testing.assert_close(network(volume), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_classes=1), "num_classes must be at least 2, got 1"),
        (dict(num_classes=3, inner_mode="cubic"), "inner_mode must be .* got 'cubic'"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShapesUNet(**options)
