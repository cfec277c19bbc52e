"""Slice attention against loops, its symmetries, and the detector with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_ext.config.check import ConfigError
from mmdet_ext.models.complexity import count, detector_complexity
from mmdet_ext.models.neck import KeySliceFPN
from mmdet_ext.models.slice_attention import SliceAttention

from ..small_detector import ROOT, config_of

NO_FUSION = ROOT / "configs/demo/nofusion_3slice.py"

SMALL = dict(embed=8, heads=2, feedforward=12)


def attention_of(num_slices=3, channels=5, seed=0, **options):
    """With all weights drawn: as built, the projection is zero."""
    torch.manual_seed(seed)
    module = SliceAttention(channels, num_slices, **{**SMALL, **options}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    return module


def volume(depth=3, batch=2, channels=5, height=8, width=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        batch, channels, depth, height, width, generator=generator, dtype=torch.float64
    )


def test_each_layer_starts_with_weights_of_its_own():
    first, second = SliceAttention(5, 3, layers=2, **SMALL).layers.layers
    for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"):
        a, b = first.get_parameter(name), second.get_parameter(name)
        assert not torch.equal(a, b)
        assert b.std().item() == pytest.approx(a.std().item(), rel=0.3)


def test_a_map_of_whole_patches_is_not_copied(monkeypatch):
    module, x = attention_of(), volume()
    expected = module(x)
    monkeypatch.setattr(F, "pad", None)
    assert torch.equal(module(x), expected)


def normalised(token, norm):
    centred = token - token.mean()
    return centred / torch.sqrt((centred**2).mean() + norm.eps) * norm.weight + norm.bias


def transformed(layer, tokens, heads):
    """One pre-norm transformer layer on a list of tokens, one token and head after the other."""
    size, attention = len(tokens[0]), layer.self_attn
    projected = []
    for token in tokens:
        qkv = attention.in_proj_weight @ normalised(token, layer.norm1) + attention.in_proj_bias
        projected.append(qkv.reshape(3, heads, size // heads))
    found = []
    for token, (query, _, _) in zip(tokens, projected):
        of_heads = []
        for head in range(heads):
            scores = [
                math.exp(float(query[head] @ key[head]) / math.sqrt(size // heads))
                for _, key, _ in projected
            ]
            of_heads.append(
                sum(s / sum(scores) * v[head] for s, (_, _, v) in zip(scores, projected))
            )
        y = token + attention.out_proj.weight @ torch.cat(of_heads) + attention.out_proj.bias
        hidden = layer.linear1.weight @ normalised(y, layer.norm2) + layer.linear1.bias
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        found.append(y + layer.linear2.weight @ hidden + layer.linear2.bias)
    return found


def places(size, features):
    """DETR's sine encoding of every place (CVPR 2020 code): half of it of y, half of x."""

    def of(number, total):
        angle = (number + 1) / (total + 1e-6) * 2 * math.pi
        half = features // 2
        waves = [angle / 10000 ** (2 * (i // 2) / half) for i in range(half)]
        return [math.sin(w) if i % 2 == 0 else math.cos(w) for i, w in enumerate(waves)]

    return {
        (i, j): torch.tensor(of(i, size[0]) + of(j, size[1]), dtype=torch.float64)
        for i in range(size[0])
        for j in range(size[1])
    }


@torch.no_grad()
def written_out(module, x, cells):
    """`SliceAttention.forward` in loops."""
    batch, _, depth, height, width = x.shape
    size = height // cells, width // cells
    across_volume = module.across == "volume"
    where = places(size, module.embed.out_channels) if across_volume else None
    heads = module.layers.layers[0].self_attn.num_heads
    maps = []
    for b in range(batch):
        tokens = {}
        for d in range(depth):
            for i in range(size[0]):
                for j in range(size[1]):
                    rows = slice(i * cells, (i + 1) * cells)
                    columns = slice(j * cells, (j + 1) * cells)
                    patch = x[b, :, d, rows, columns]
                    token = (module.embed.weight * patch).sum((1, 2, 3)) + module.embed.bias
                    token = token + module.slice_embedding[d]
                    tokens[d, i, j] = token + where[i, j] if across_volume else token
        groups = [list(tokens)]
        if not across_volume:
            groups = [[(d, *at) for d in range(depth)] for at in {key[1:] for key in tokens}]
        for group in groups:
            sequence = [tokens[key] for key in group]
            for layer in module.layers.layers:
                sequence = transformed(layer, sequence, heads)
            tokens.update(zip(group, sequence))
        y = torch.empty(module.project.out_channels, *size, dtype=x.dtype)
        for i in range(size[0]):
            for j in range(size[1]):
                token = normalised(tokens[depth // 2, i, j], module.layers.norm)
                y[:, i, j] = module.project.weight[:, :, 0, 0] @ token + module.project.bias
        maps.append(y)
    return F.interpolate(torch.stack(maps), (height, width), mode="bilinear")


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("across", ["slices", "volume"])
@pytest.mark.parametrize("patch, layers", [(16, 1), (4, 2)])
def test_it_is_what_loops_give(depth, across, patch, layers):
    module = attention_of(depth, patch=patch, across=across, layers=layers)
    x = volume(depth, 1, height=3, width=4) if patch == 4 else volume(depth)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    expected = written_out(module, x, patch // 4)
    atol = 1e-5 if across == "volume" else 1e-9  # mmdet's sine encoding is of float32
    torch.testing.assert_close(module(x), expected, rtol=0, atol=atol)
    with torch.no_grad():  # at inference PyTorch has a program of its own
        torch.testing.assert_close(module.eval()(x), expected, rtol=0, atol=atol)


def test_of_one_slice_it_looks_at_each_patch_alone():
    module, x = attention_of(1, patch=4), volume(1)
    changed = x.clone()
    changed[:, :, :, 2, 3] += 1
    differs = (module(x) != module(changed)).any(1).nonzero()
    assert {tuple(place) for place in differs[:, 1:].tolist()} == {(2, 3)}
    # The softmax of one token is 1: queries and keys do not count.
    before = module(x)
    with torch.no_grad():
        for layer in module.layers.layers:
            layer.self_attn.in_proj_weight[:16].normal_()
    torch.testing.assert_close(module(x), before)


def test_the_order_of_the_other_slices_counts_only_by_their_embedding():
    module, x = attention_of(5, patch=8), volume(5)
    other = x[:, :, [4, 0, 2, 1, 3]]
    assert not torch.allclose(module(x), module(other))
    with torch.no_grad():
        module.slice_embedding[:] = module.slice_embedding[2]
    torch.testing.assert_close(module(x), module(other))
    assert not torch.allclose(module(x), module(x[:, :, [2, 1, 0, 3, 4]]))  # another key slice


def test_across_slices_a_patch_is_known_by_what_is_in_it_alone():
    x = volume()
    module = attention_of(patch=4)
    torch.testing.assert_close(module(x.roll((1, 3), (3, 4))), module(x).roll((1, 3), (2, 3)))
    module = attention_of(patch=4, across="volume")
    assert not torch.allclose(module(x.roll(1, 3)), module(x).roll(1, 2))


@pytest.mark.parametrize("across, reach", [("slices", 1), ("volume", 96)])
def test_every_slice_is_seen_and_how_far(across, reach):
    module, x = attention_of(patch=4, across=across), volume(batch=1).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0, 0, 4, 5], x)
    seen = (gradient[0].abs().sum(0) > 0).flatten(1).sum(1)
    assert seen.tolist() == [reach] * 3


def test_gradients_reach_every_weight_and_are_right():
    module = attention_of(channels=2, patch=8, across="volume", layers=2)
    x = volume(batch=1, channels=2, height=2, width=4).requires_grad_()
    assert torch.autograd.gradcheck(module, x)
    module(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_sides_that_are_no_multiple_of_a_patch_are_filled_up():
    module, x = attention_of(patch=16), volume(height=6, width=9)
    filled = F.pad(x, (0, 3, 0, 2))
    torch.testing.assert_close(module(x), module(filled)[..., :6, :9])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(across="images"), "across must be one of"),
        (dict(num_slices=4), "num_slices=4 is not odd"),
        (dict(patch=6), "patch=6 px is not a multiple of the map's stride 4"),
        (dict(embed=9), "embed=9 must be a multiple of heads=2"),
        (dict(embed=6, across="volume"), "and of 4"),
        (dict(layers=0), "at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SliceAttention(4, **{"num_slices": 3, **SMALL, **options})


def test_another_depth_is_refused():
    with pytest.raises(ValueError, match="num_slices=3, the volume has 5"):
        attention_of()(volume(5))


def neck_of(**options):
    torch.manual_seed(0)
    return KeySliceFPN((4, 6, 8), num_slices=3, out_channels=5, **options).double()


def test_the_neck_starts_as_the_one_without():
    features = [volume(3, 2, c, 16 >> i, 16 >> i) for i, c in enumerate((4, 6, 8))]
    plain, neck = neck_of(), neck_of(attention=dict(type="SliceAttention", **SMALL))
    missing, unexpected = neck.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("attentions.") for name in missing)
    (expected,) = plain(features)
    assert torch.equal(neck(features)[0], expected)
    # A patch is 16 px of the image on every level.
    assert [a.embed.kernel_size for a in neck.attentions] == [(4, 4), (2, 2), (1, 1)]
    with torch.no_grad():
        neck.attentions[2].project.bias[3] = 1.0
        shift = neck.laterals[2].weight[:, 3, 0, 0]
    difference = neck(features)[0] - expected
    torch.testing.assert_close(difference, shift.view(1, -1, 1, 1).expand_as(difference))


@pytest.mark.parametrize("across", ["slices", "volume"])
@pytest.mark.parametrize("depth", [1, 7])
def test_operations_by_formula(depth, across):
    channels, embed, hidden, cells = 32, 16, 24, 4
    module = SliceAttention(
        channels, depth, patch=16, embed=embed, heads=2, feedforward=hidden, across=across
    ).to("meta")
    counted, out = count(module, torch.empty(1, channels, depth, 32, 64, device="meta"))
    assert out.shape == (1, channels, 32, 64)
    patches = 8 * 16
    tokens = patches * depth
    seen = depth if across == "slices" else tokens
    matrices = (
        tokens * channels * cells**2 * embed  # patches
        + tokens * (4 * embed**2 + 2 * embed * hidden)  # q, k, v, output, feedforward
        + 2 * tokens * seen * embed  # scores, weighted values
        + patches * embed * channels  # projection
    )
    # One product an element, such as the scaling of queries, and no matrix product more.
    assert matrices <= counted.multiply_adds <= matrices + 4 * tokens * (embed + seen)
    assert counted.parameters == (
        channels * cells**2 * embed + embed
        + depth * embed
        + 4 * embed**2 + 4 * embed + 2 * embed * hidden + hidden + embed
        + 6 * embed
        + embed * channels + channels
    )  # fmt: skip
    assert isinstance(module.layers.layers[0], nn.TransformerEncoderLayer)


ATTENTION = {
    f"model.neck.attention.{k}": v for k, v in dict(type="SliceAttention", **SMALL).items()
}


@pytest.mark.parametrize("slices_as_channels", [False, True])
def test_the_detector_infers_what_it_trains(slices_as_channels):
    flat = {"model.backbone.slices_as_channels": True, "path": NO_FUSION}
    options = flat if slices_as_channels else {}
    config = config_of(**ATTENTION, **options)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    assert len(model.neck.attentions[0].slice_embedding) == (1 if slices_as_channels else 3)
    with torch.no_grad():
        for attention in model.neck.attentions:
            attention.project.weight.normal_()
    model.eval()
    batch = torch.randn(2, 1, 3, 96, 96) * 60, torch.tensor([1.0, math.inf])
    (recorded,) = model.extract_feat(batch)
    with torch.no_grad():
        (inferred,) = model.extract_feat(batch)
    atol = 1e-5 * recorded.abs().max().item()
    torch.testing.assert_close(inferred, recorded, rtol=0, atol=atol)
    parts = detector_complexity(config, 32)
    plain = detector_complexity(config_of(**options), 32)
    own = sum(p.numel() for p in model.neck.attentions.parameters())
    assert parts["neck"].parameters - plain["neck"].parameters == own


def test_the_config_check_knows_its_options():
    with pytest.raises(ConfigError, match=r"did you mean model.neck.attention.heads\?"):
        config_of(**ATTENTION, **{"model.neck.attention.head": 4})
    with pytest.raises(ConfigError, match="did you mean 'SliceAttention'"):
        config_of(**{"model.neck.attention.type": "SliceAttentoin"})
