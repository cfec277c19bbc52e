"""Released checkpoints: the converted detector computes what the released network computes, here
written straight from its layout with the functions of torch."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mmdet_ext.config.experiment import read_experiment
from mmdet_ext.config.network import TRAINED_AS, network_of
from mmdet_ext.released.weights import (
    convert,
    convert_file,
    detect,
    expected_shapes,
    released_state_dict,
)

from ..released_network import (
    DENSENET121,
    TINY,
    linear_map,
    released_shapes,
    released_weights,
    tiny_detector,
)

REDUCTION = "backbone.reductionz1.reduction_z_conv"
KINDS = ["alignshift", "tsm", "a3d", "25d"]


def released_backbone(weights, x, kind, thickness):
    """(B, 1, D, H, W) -> (B, neck, H/4, W/4), as the released network computes it."""

    def norm(x, name):
        mean, var, gain, offset = (
            weights[f"backbone.{name}.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        y = (x - mean[:, None, None, None]) / (var[:, None, None, None] + 1e-5).sqrt()
        return y * gain[:, None, None, None] + offset[:, None, None, None]

    def fuse(x, name):
        if kind == "a3d":
            mixing = weights[f"backbone.{name}.adaptive_align_weights"]
            return torch.einsum("bcdhw,dkc->bckhw", x, mixing)
        if kind == "25d":
            return x
        fold, depth = x.shape[1] // 8, x.shape[2]
        y = x.clone()
        for b, mm in enumerate(thickness.tolist()):
            alpha = min(2 / mm, 1) if kind == "alignshift" else 1.0
            for d in range(depth):
                for first, other in ((0, d + 1), (fold, d - 1)):
                    own = x[b, first : first + fold, d]
                    if 0 <= other < depth:
                        neighbour = x[b, first : first + fold, other]
                    else:  # released AlignShift leaves the border alone, TSM shifts in zeros
                        neighbour = own if kind == "alignshift" else torch.zeros_like(own)
                    y[b, first : first + fold, d] = alpha * neighbour + (1 - alpha) * own
        return y

    def conv(x, name, stride=1, padding=0):
        weight = weights[f"backbone.{name}.weight"][:, :, None]
        return F.conv3d(x, weight, None, (1, stride, stride), (0, padding, padding))

    if kind == "25d":
        x = x.transpose(1, 2)
    x = norm(conv(x, "conv0", 2, 3), "norm0").relu()
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    maps = []
    for i, layers in enumerate(TINY["blocks"], start=1):
        for j in range(1, layers + 1):
            name = f"denseblock{i}.denselayer{j}"
            y = norm(x, f"{name}.norm1").relu()
            y = conv(fuse(y, f"{name}.conv1"), f"{name}.conv1")
            y = norm(y, f"{name}.norm2").relu()
            y = conv(fuse(y, f"{name}.conv2"), f"{name}.conv2", padding=1)
            x = torch.cat([x, y], 1)
        y = x[:, :, 0]
        if kind != "25d":
            y = F.conv3d(x, weights[f"backbone.reductionz{i}.reduction_z_conv.weight"])[:, :, 0]
        maps.append(linear_map(weights, f"backbone.lateral{i + 1}", y))
        if i < len(TINY["blocks"]):
            x = conv(norm(x, f"transition{i}.norm").relu(), f"transition{i}.conv")
            x = F.avg_pool3d(x, (1, 2, 2))
    y = maps[2]
    for finer in (maps[1], maps[0]):
        y = finer + y.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return y


@pytest.fixture(scope="module", params=[(k, d) for k in KINDS for d in (3, 7)], ids=str)
def converted(request, repository):
    """(kind, slices, released weights, our model with them loaded)."""
    kind, slices = request.param
    return kind, slices, *tiny_detector(kind, slices, repository)


@torch.no_grad()
def test_backbone_neck_and_rpn_compute_what_the_released_ones_do(converted):
    kind, slices, weights, model = converted
    volume = torch.randn(3, 1, slices, 32, 48, generator=torch.Generator().manual_seed(1))
    thickness = torch.tensor([1.0, 5.0, float("inf")])
    expected = released_backbone(weights, volume, kind, thickness)
    features = model.extract_feat((volume, thickness))
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-4)
    (scores,), (deltas,) = model.rpn_head(features)
    weight, bias = weights["rpn_head.rpn_conv.weight"], weights["rpn_head.rpn_conv.bias"]
    hidden = F.conv2d(expected, weight, bias, padding=1).relu()
    for got, name in ((scores, "rpn_head.rpn_cls"), (deltas, "rpn_head.rpn_reg")):
        torch.testing.assert_close(got, linear_map(weights, name, hidden), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_heads_compute_what_the_released_ones_do_with_the_classes_of_mmdet_3(converted):
    _, _, weights, model = converted
    rois = torch.randn(5, TINY["neck"], 7, 7, generator=torch.Generator().manual_seed(2))
    hidden = rois.flatten(1)
    for i in range(2):
        weight, bias = (weights[f"bbox_head.shared_fcs.{i}.{p}"] for p in ("weight", "bias"))
        hidden = (hidden @ weight.T + bias).relu()
    old_scores = hidden @ weights["bbox_head.fc_cls.weight"].T + weights["bbox_head.fc_cls.bias"]
    old_deltas = hidden @ weights["bbox_head.fc_reg.weight"].T + weights["bbox_head.fc_reg.bias"]
    scores, deltas = model.roi_head.bbox_head(rois)
    # Lesion is class 1 of the old and class 0 of the new; then the old has the background's box.
    torch.testing.assert_close(scores.softmax(1)[:, 0], old_scores.softmax(1)[:, 1])
    torch.testing.assert_close(deltas, old_deltas.view(5, 2, 4)[:, 1])

    y = torch.randn(5, TINY["neck"], 14, 14, generator=torch.Generator().manual_seed(3))
    masks = model.roi_head.mask_head(y.clone())
    for i in range(4):
        name = f"mask_head.convs.{i}.conv"
        y = F.conv2d(y, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).relu()
    weight, bias = weights["mask_head.upsample.weight"], weights["mask_head.upsample.bias"]
    y = F.conv_transpose2d(y, weight, bias, stride=2).relu()
    y = linear_map(weights, "mask_head.conv_logits", y)
    torch.testing.assert_close(masks, y[:, 1:2], rtol=1e-4, atol=1e-4)


def hollow(kind, slices, sizes=DENSENET121):
    """Released weights in full size whose file is small: every tensor is one number, repeated."""
    shapes = released_shapes(kind, slices, **sizes)
    return {name: torch.full((), 0.5).expand(shape) for name, shape in shapes.items()}


def run(repository, *arguments, expect=0):
    result = subprocess.run(
        [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    "kind, slices, configs",
    [
        ("alignshift", 7, ["alignshift_7slice", "tsm_7slice"]),
        ("alignshift", 3, ["alignshift_3slice", "tsm_3slice"]),
        ("a3d", 3, ["a3d_3slice"]),
        ("a3d", 7, ["a3d_7slice"]),
        ("25d", 3, ["25d_3slice"]),
        ("25d", 7, ["25d_7slice"]),
    ],
)
def test_full_size_detectors_are_recognised_and_fit_their_config(kind, slices, configs, repository):
    released = hollow(kind, slices)
    found = detect(released)
    assert (list(found.configs), found.num_slices) == (configs, slices)
    assert f"{slices} slices" in found.description
    for name in configs:
        shapes = expected_shapes(repository / f"configs/released/{name}.py")
        assert convert(released, shapes).keys() == shapes.keys()
        part = convert(released, shapes, "backbone")
        assert {key.partition(".")[0] for key in part} == {"backbone", "neck"}
        trunk = {k: v for k, v in released.items() if k.startswith("backbone.")}
        assert convert(trunk, shapes, "backbone").keys() == part.keys()


def test_command_reads_old_files_and_names_architecture_and_config(repository, tmp_path):
    weights = {f"module.{k}": v for k, v in hollow("alignshift", 7).items()}
    meta = dict(mmdet_version="1.1.0", config="model = dict()", epoch=20, CLASSES=("lesion",))
    content = dict(state_dict=weights, meta=meta, optimizer=dict(state={}, param_groups=[]))
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    output = run(repository, tmp_path / "in.pth", tmp_path / "out.pth")
    assert "AlignShift or TSM" in output and "7 slices" in output
    for kind in ("alignshift", "tsm"):
        assert f"tools/test.py configs/released/{kind}_7slice.py {tmp_path / 'out.pth'}" in output
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert set(content) == {"state_dict", "meta"}
    assert content["meta"]["converted_from"] == "in.pth"
    # A config is compared with it before the weights run: they may be of either.
    for kind, network in zip(("alignshift", "tsm"), content["meta"][TRAINED_AS], strict=True):
        config = read_experiment(repository / f"configs/released/{kind}_7slice.py")
        assert network == network_of(config)
    assert content["state_dict"]["roi_head.bbox_head.fc_reg.weight"].shape == (4, 2048)
    assert not list(tmp_path.glob("*.part"))


def test_bare_backbone_needs_the_part_option(repository, tmp_path):
    trunk = {k: v for k, v in hollow("a3d", 3).items() if k.startswith("backbone.")}
    torch.save(trunk, tmp_path / "in.pth")
    files = tmp_path / "in.pth", tmp_path / "out.pth", repository / "configs/released"
    with pytest.raises(ValueError, match=r"missing rpn_head.rpn_conv.weight[\s\S]*--part backbone"):
        convert_file(*files)
    assert not (tmp_path / "out.pth").exists()
    found, count = convert_file(*files, part="backbone")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert found.configs == ("a3d_3slice",) and len(content["state_dict"]) == count
    assert content["meta"]["part"] == "backbone"


@pytest.fixture(scope="module")
def shapes(repository):
    """Of our tiny A3D."""
    _, model = tiny_detector("a3d", 3, repository)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_every_unknown_missing_or_misshapen_key_is_listed(shapes):
    weights = released_weights("a3d", 3)
    weights["backbone.denseblock1.denselayer9.conv1.weight"] = torch.zeros(1)
    weights["ema.backbone.conv0.weight"] = torch.zeros(1)
    weights["backbone.lateral3.weight"] = torch.zeros(2, 2, 1, 1)
    weights["bbox_head.fc_cls.weight"] = torch.zeros(9, 20)
    weights["backbone.denseblock2.denselayer1.conv2.adaptive_align_weights"] = torch.ones(7, 7, 16)
    del weights["mask_head.upsample.bias"], weights["backbone.norm0.running_var"]
    with pytest.raises(ValueError) as error:
        convert(weights, shapes)
    message = str(error.value)
    for part in (
        "unknown backbone.denseblock1.denselayer9.conv1.weight",
        "unknown ema.backbone.conv0.weight",
        "backbone.lateral3.weight has shape (2, 2, 1, 1), expected (24, 28, 1, 1)",
        "bbox_head.fc_cls.weight has shape (9, 20), expected (2, 20)",
        "conv2.adaptive_align_weights has shape (7, 7, 16), expected (3, 3, 16)",
        "missing mask_head.upsample.bias",
        "missing backbone.norm0.running_var",
    ):
        assert part in message
    assert "--part" not in message


@pytest.mark.parametrize("part", ["all", "backbone"])
def test_any_single_key_that_is_taken_away_is_missed(shapes, part):
    weights = released_weights("a3d", 3)
    unused = 0
    for key in weights:
        rest = {k: v for k, v in weights.items() if k != key}
        needed = part == "all" or key.startswith("backbone.")
        if not needed or (".denseblock" not in key and "adaptive_align" in key):
            convert(rest, shapes, part)
            unused += 1
        else:
            with pytest.raises(ValueError, match=f"missing {re.escape(key)}$"):
                convert(rest, shapes, part)
    assert unused == (3 if part == "all" else 3 + 26)


def test_what_is_no_released_checkpoint_is_refused(repository, tmp_path):
    with pytest.raises(ValueError, match="state dict"):
        released_state_dict([1, 2])
    with pytest.raises(ValueError, match="not a state dict: epoch"):
        released_state_dict({"epoch": 3, "a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"conv0.weight.*is missing"):
        detect({"backbone.layer1.weight": torch.zeros(1)})
    odd = hollow("a3d", 3, TINY) | {f"{REDUCTION}.weight": torch.zeros(24, 24, 1, 1)}
    with pytest.raises(ValueError, match=rf"{REDUCTION}.*\(C, C, D, 1, 1\)"):
        detect(odd)
    torch.save(hollow("a3d", 9, TINY), tmp_path / "in.pth")
    configs = repository / "configs/released"
    with pytest.raises(ValueError, match=r"A3D, 9 slices.*a3d_9slice\.py"):
        convert_file(tmp_path / "in.pth", tmp_path / "out.pth", configs)
    with pytest.raises(ValueError, match="another name"):
        convert_file(tmp_path / "in.pth", tmp_path / "in.pth", configs)
    output = run(repository, tmp_path / "none.pth", tmp_path / "out.pth", expect=1)
    assert "Traceback" not in output and "none.pth" in output


@pytest.mark.parametrize("meta", [{TRAINED_AS: []}, {"epoch": 3}], ids=["recorded", "earlier"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_of_this_repository_needs_no_conversion(repository, tmp_path, kind, meta):
    _, model = tiny_detector(kind, 3, repository)
    torch.save({"state_dict": model.state_dict(), "meta": meta}, tmp_path / "own.pth")
    files = tmp_path / "own.pth", tmp_path / "out.pth", repository / "configs/released"
    with pytest.raises(ValueError, match=r"own.pth: .*format of this repository already.*as it is"):
        convert_file(*files)
    assert not (tmp_path / "out.pth").exists()
