"""Volumetric attention against loops from its formulas, and its laws."""

import math

import numpy as np
import pytest
import torch

from mmdet_ext.models.attention import (
    SCALES,
    VolumetricAttention,
    VolumetricChannelAttention,
    VolumetricSpatialAttention,
    entropy,
)

C, H, W = 8, 5, 6


def bag(images=3, batch=2, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, images, C, H, W)
    return torch.randn(shape, generator=generator, dtype=torch.float64, **options)


def attention(kind=VolumetricAttention, seed=0, **options):
    torch.manual_seed(seed)
    arguments = () if kind is VolumetricSpatialAttention else (C,)
    if kind is not VolumetricSpatialAttention:
        options = dict(reduction=4, **options)
    return kind(*arguments, **options).double()


def array(tensor):
    return tensor.detach().numpy()


def softmax(values):
    exponents = [math.exp(v - max(values)) for v in values]
    return [e / sum(exponents) for e in exponents]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain_channel(module, query, images):
    """Section 2.2 word by word, of one sample: (C, H, W), list of (C, H, W) -> (C,) gate."""

    def emb(v):
        hidden = array(module.embed[0].weight) @ v + array(module.embed[0].bias)
        return array(module.embed[2].weight) @ np.maximum(hidden, 0) + array(module.embed[2].bias)

    def average(x):
        return np.array([sum(x[c].ravel()) / x[c].size for c in range(len(x))])

    q = emb(average(query))
    keys = [emb(average(x)) for x in images]
    weights = softmax([sum(q[c] * k[c] for c in range(C)) for k in keys])
    attended = sum(w * k for w, k in zip(weights, keys))
    last = array(module.last.weight)[:, :, 0, 0] @ np.maximum(attended, 0) + array(module.last.bias)
    return sigmoid(last), weights


def plain_spatial(module, query, images):
    """Section 2.2 word by word, of one sample -> (H, W) gate."""
    kernel, bias = array(module.embed.weight)[0], array(module.embed.bias)[0]

    def emb(x):
        maps = np.pad(np.stack([x.max(0), x.mean(0)]), ((0, 0), (3, 3), (3, 3)))
        out = np.empty((H, W))
        for i in range(H):
            for j in range(W):
                out[i, j] = bias + (maps[:, i : i + 7, j : j + 7] * kernel).sum()
        return out

    q = emb(query)
    keys = [emb(x) for x in images]
    divisor = {"sqrt": (H * W) ** 0.5, "mean": H * W, "none": 1}[module.scale]
    weights = softmax([(q * k).sum() / divisor for k in keys])
    attended = sum(w * k for w, k in zip(weights, keys))
    last = module.last.weight.item() * np.maximum(attended, 0) + module.last.bias.item()
    return sigmoid(last), weights


@pytest.mark.parametrize("images, target", [(1, None), (2, 0), (3, None), (4, 3), (5, 1)])
@pytest.mark.parametrize(
    "channel, spatial, scale",
    [(True, False, "sqrt"), *((c, True, scale) for c in (True, False) for scale in SCALES)],
)
def test_forward_is_the_formula(images, target, channel, spatial, scale):
    module = attention(channel=channel, spatial=spatial, scale=scale)
    x = bag(images)
    y, weights = module.attend(x, target)
    assert torch.equal(y, module(x, target))
    for sample, out in zip(range(len(x)), array(y), strict=True):
        maps = list(array(x)[sample])
        expected = maps[images // 2 if target is None else target]
        if channel:
            gate, plain = plain_channel(module.channel, expected, maps)
            expected = gate[:, None, None] * expected
            np.testing.assert_allclose(array(weights["channel"])[sample], plain, atol=1e-10)
        if spatial:
            gate, plain = plain_spatial(module.spatial, expected, maps)
            expected = gate * expected
            np.testing.assert_allclose(array(weights["spatial"])[sample], plain, atol=1e-10)
        np.testing.assert_allclose(out, expected, atol=1e-10)


def twin(module, x):
    """The same by torch's slow operations, one sample and one image at a time."""
    outputs = []
    for maps in x:
        y = maps[len(maps) // 2]
        part = module.channel
        if part is not None:
            q = part.embed(y.mean((1, 2)))
            keys = [part.embed(m.mean((1, 2))) for m in maps]
            a = torch.stack([(q * k).sum() for k in keys]).softmax(0)
            mixed = sum(w * k for w, k in zip(a, keys)).relu()
            y = y * (part.last.weight[:, :, 0, 0] @ mixed + part.last.bias).sigmoid()[:, None, None]
        part = module.spatial
        if part is not None:

            def emb(m, part=part):
                return part.embed(torch.stack([m.max(0).values, m.mean(0)])[None])[0, 0]

            q, keys = emb(y), [emb(m) for m in maps]
            a = torch.stack([(q * k).sum() / math.sqrt(H * W) for k in keys]).softmax(0)
            mixed = sum(w * k for w, k in zip(a, keys)).relu()
            y = y * (part.last.weight[0, 0, 0, 0] * mixed + part.last.bias).sigmoid()
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("images", [1, 3, 4])
def test_gradients_are_those_of_the_slow_twin(images):
    module = attention()
    x = bag(images).requires_grad_()
    weight = bag(1, seed=1)[:, 0]
    leaves = [x, *module.parameters()]
    one = torch.autograd.grad((module(x) * weight).sum(), leaves)
    two = torch.autograd.grad((twin(module, x) * weight).sum(), leaves)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, dict(shared_embedding=False), dict(target_in_bag=False)])
def test_gradients_are_those_of_finite_differences(options):
    module = attention(**options)
    x = bag(3, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))


def test_rows_of_attention_sum_to_one_and_permute_with_the_context():
    module = attention()
    x = bag(5)
    y, weights = module.attend(x, 2)
    order = [3, 0, 2, 4, 1]
    permuted, permuted_weights = module.attend(x[:, order], 2)
    torch.testing.assert_close(permuted, y)
    for name in ("channel", "spatial"):
        torch.testing.assert_close(weights[name].sum(1), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(permuted_weights[name], weights[name][:, order])


def test_identical_slices_get_uniform_attention():
    x = bag(1).expand(-1, 5, -1, -1, -1)
    _, weights = attention(spatial=False).attend(x)
    torch.testing.assert_close(weights["channel"], torch.full((2, 5), 0.2, dtype=torch.float64))
    _, weights = attention(channel=False).attend(x)
    torch.testing.assert_close(weights["spatial"], torch.full((2, 5), 0.2, dtype=torch.float64))


def test_one_image_attends_to_itself_alone():
    _, weights = attention().attend(bag(1))
    assert all((w == 1).all() for w in weights.values())


def large_bag(seed=0):
    """Maps as large as a level P2 of real slices, whose neighbours are much alike."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn((1, 1, C, 96, 96), generator=generator)
    return 2 + shared + 0.3 * torch.randn((1, 3, C, 96, 96), generator=generator)


def context_gradient(scale):
    torch.manual_seed(0)
    module = VolumetricAttention(C, channel=False, scale=scale)
    x = large_bag().requires_grad_()
    module(x).sum().backward()
    return x.grad.abs().amax((0, 2, 3, 4)), module.attend(x)[1]["spatial"]


@pytest.mark.parametrize("scale", ["sqrt", "mean"])
def test_gradient_reaches_every_context_image(scale):
    gradient, weights = context_gradient(scale)
    assert (gradient > 0).all() and (weights > 1e-6).all()


def test_no_gradient_reaches_the_context_as_printed():
    """Logits in the thousands: the softmax is one-hot, to the last bit."""
    gradient, weights = context_gradient("none")
    assert weights.max() == 1 and (weights.sort(1).values[:, :-1] < 1e-6).all()
    assert (gradient.sort().values[:-1] < 1e-6).all()


def test_detached_context_gets_no_gradient_and_the_target_does():
    x = bag().requires_grad_()
    plain, detached = attention(), attention(detach_context=True)
    torch.testing.assert_close(plain(x), detached(x))
    detached(x).sum().backward()
    assert not x.grad[:, [0, 2]].any() and x.grad[:, 1].all()


def test_without_the_target_only_the_context_is_attended_to():
    module = attention(target_in_bag=False)
    x = bag(3)
    _, weights = module.attend(x)
    assert all(w.shape == (2, 2) for w in weights.values())
    with pytest.raises(ValueError, match="besides its target"):
        module(bag(1))


@pytest.mark.parametrize("initial", [0.5, 0.98])
def test_the_gate_starts_where_it_is_told(initial):
    module = attention(initial_gate=initial)
    zero = torch.zeros(1, 3, C, H, W, dtype=torch.float64)
    for part in (module.channel, module.spatial):
        for embedding in part.embed.modules():
            if hasattr(embedding, "bias") and embedding.bias is not None:
                torch.nn.init.zeros_(embedding.bias)
        gate, _ = part.gate(*part.split(zero))
        torch.testing.assert_close(gate, torch.full_like(gate, initial))


def test_parameters_are_those_of_the_formulas_with_biases():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(VolumetricChannelAttention(256)) == 8192 + 272 + 65_792
    assert count(VolumetricSpatialAttention()) == 101
    assert 5 * count(VolumetricAttention(256)) == 371_785


def test_entropy_is_one_if_uniform_and_zero_if_one_hot():
    assert entropy(torch.full((2, 5), 0.2)).item() == pytest.approx(1)
    assert entropy(torch.eye(3)).item() == 0
    assert entropy(torch.ones(4, 1)).item() == 0


def test_half_precision_neither_overflows_nor_changes_the_type():
    """A sum over 96 x 96 places leaves the range of float16; autocast on a CPU is bfloat16."""
    torch.manual_seed(0)
    module = VolumetricAttention(C, reduction=4)
    x = large_bag()
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.05)
    y = VolumetricSpatialAttention("none").half()(30 * x.half())
    assert y.dtype == torch.float16 and y.isfinite().all()


def test_channels_last_and_compiled_are_the_same():
    module = attention()
    x = bag()
    last = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    torch.testing.assert_close(module(last), module(x))
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: VolumetricAttention(C, channel=False, spatial=False), "channel=True or spatial"),
        (lambda: VolumetricAttention(C, reduction=16), "reduction"),
        (lambda: VolumetricAttention(C, reduction=0), "reduction"),
        (lambda: VolumetricAttention(C, channel=False, reduction=0), "reduction"),
        (lambda: VolumetricAttention(16, scale="max"), "scale"),
        (lambda: VolumetricAttention(16, spatial=False, scale="max"), "scale"),
        (lambda: VolumetricAttention(16, initial_gate=1.0), "initial_gate"),
        (lambda: attention()(bag()[0]), "a bag is"),
        (lambda: attention()(bag(), 3), "images 0 to 2"),
        (lambda: attention()(bag(), -1), "images 0 to 2"),
    ],
)
def test_options_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
