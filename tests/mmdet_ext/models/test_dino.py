"""DINO on the key slice: its maps, its configs, training and inference, what it costs."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from deeplesion.errors import UserError
from mmdet_ext.checkpoint import load_checkpoint_file
from mmdet_ext.config.check import ConfigError
from mmdet_ext.engine.predict import LesionDetector
from mmdet_ext.engine.run import load_config, train
from mmdet_ext.models.complexity import detector_complexity
from mmdet_ext.models.dino import KeySliceDINO, KeySliceLevels
from mmdet_ext.models.shared_slices import SharedSlices

from ..small_detector import ROOT, body_of, volume_of, write_checkpoint
from ..small_detector import SMALL as COMMON
from .let_go import one_at_a_time

DEMO = ROOT / "configs/demo/dino_3slice.py"
SMALL = {
    "model.test_cfg.max_per_img": 8,
    "model.num_queries": 20,
    "model.encoder.num_layers": 1,
    "model.decoder.num_layers": 2,
}
ATTENTION = {
    f"model.neck.attention.{name}": value
    for name, value in dict(type="SliceAttention", embed=8, heads=2, feedforward=8).items()
}


def small_config(**options):
    """Without the option of Mask R-CNN that `config_of` sets."""
    common = {name: value for name, value in COMMON.items() if "rcnn" not in name}
    return load_config(str(DEMO), {**common, **SMALL, **options})


def built(config, seed=0):
    init_default_scope("mmdet")
    torch.manual_seed(seed)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture
def model(config):
    return built(config)


def batch_of(model, lesions=(2, 0), sizes=((96, 96), (96, 70)), training=True):
    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for number, (height, width) in zip(lesions, sizes):
        depth = model.num_slices
        hu = torch.randint(-200, 300, (1, depth, height, width), generator=generator)
        inputs.append(hu.to(torch.int16))
        sample = DetDataSample(
            metainfo=dict(
                img_path="a/001.png",
                img_shape=(height, width),
                ori_shape=(height, width),
                scale_factor=(1.0, 1.0),
                thickness_mm=2.0,
            )
        )
        boxes = torch.tensor([[16.0, 20, 40, 44], [50, 50, 60, 66]])[:number]
        labels = torch.zeros(number, dtype=torch.long)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        samples.append(sample)
    return model.data_preprocessor(dict(inputs=inputs, data_samples=samples), training)


def maps_of(channels=(4, 6, 8), depth=3):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, c, depth, 32 >> i, 32 >> i, generator=generator, dtype=torch.float64)
        for i, c in enumerate(channels)
    ]


@pytest.mark.parametrize("first_level, num_outs", [(1, 3), (0, 3), (2, 4)])
@pytest.mark.parametrize("depth", [1, 3])
def test_levels_by_hand(first_level, num_outs, depth):
    torch.manual_seed(0)
    norm = dict(type="GN", num_groups=2)
    neck = KeySliceLevels((4, 6, 8), depth, first_level, num_outs, 10, norm).double()
    features = maps_of(depth=depth)
    got = neck(iter(x.contiguous(memory_format=torch.channels_last_3d) for x in features))
    squeezed, expected = [], []
    for x, reduction in zip(features[first_level:], neck.reductions, strict=True):
        squeezed.append(F.conv3d(x, reduction.weight)[:, :, 0] if depth > 1 else x[:, :, 0])
    inputs = [*squeezed, squeezed[-1]]
    modules = [*neck.mapper.convs, *(neck.mapper.extra_convs or ())]
    for i, module in enumerate(modules):
        extra = i >= len(squeezed)
        x = expected[-1] if i > len(squeezed) else inputs[i]
        y = F.conv2d(x, module.conv.weight, None, stride=1 + extra, padding=int(extra))
        expected.append(F.group_norm(y, 2, module.gn.weight, module.gn.bias))
    assert [len(got), len(expected)] == [num_outs] * 2
    assert [y.shape[-1] for y in got] == [(32 >> first_level) >> i for i in range(num_outs)]
    for one, other in zip(got, expected):
        assert one.is_contiguous()  # DINO reads the memory as NCHW
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_maps_that_come_one_at_a_time_are_let_go():
    neck, alive = KeySliceLevels((4, 6, 8), out_channels=4).double(), []

    with torch.no_grad():
        got, expected = neck(one_at_a_time(maps_of(), alive)), neck(maps_of())
    assert len(alive) == 3 and all(map(torch.equal, got, expected))


@pytest.mark.parametrize("first_level, num_outs", [(3, 3), (-1, 3), (0, 2)])
def test_levels_that_cannot_be_are_refused(first_level, num_outs):
    with pytest.raises(ValueError, match=f"first_level={first_level} leaves .* num_outs"):
        KeySliceLevels((4, 6, 8), 3, first_level, num_outs, 8)


def test_slice_attention_sees_the_maps_that_are_used():
    model = built(small_config(**ATTENTION))
    # A patch of 16 px is 2 cells at stride 8 and 1 at stride 16.
    assert [a.embed.kernel_size for a in model.neck.attentions] == [(2, 2), (1, 1)]
    assert [a.embed.in_channels for a in model.neck.attentions] == [30, 27]


@pytest.mark.parametrize("name", ["dino/dino_7slice", "demo/dino_3slice"])
def test_configs(name):
    config = load_config(name, {"model.backbone.init_cfg": None})
    slices = 7 if "7" in name else 3
    assert config.stack.num_slices == config.model.num_slices == slices
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(config.model)
        features = model.extract_feat((torch.empty(1, 1, slices, 256, 256), torch.empty(1)))
    channels = model.embed_dims
    assert [tuple(x.shape) for x in features] == [
        (1, channels, 256 // s, 256 // s) for s in (8, 16, 32)
    ]
    # A deformable attention for each level, wherever levels are counted.
    levels = {m.num_levels for m in model.modules() if hasattr(m, "num_levels")}
    assert levels == {3} and model.num_feature_levels == 3
    assert config.test_cfg and config.model.test_cfg.max_per_img == 50
    steps = [step.type for step in config.train_dataloader.dataset.pipeline]
    assert steps == ["LoadCTSlices", "LoadAnnotations", "RandomAffineResize", "PackCTInputs"]


def test_building_it_leaves_the_config_as_it_is(config):
    before = copy.deepcopy(config.model.to_dict())
    weights = [built(config).state_dict() for _ in range(2)]  # mmdet's refuses the second time
    assert config.model.to_dict() == before
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("lesions", [(2, 0), (0, 0), (1, 2)])
def test_a_step_of_training(model, lesions):
    batch = batch_of(model.train(), lesions)
    total, values = model.parse_losses(model(**batch, mode="loss"))
    assert all(torch.isfinite(value) for value in values.values())
    # Of every decoder layer, of the encoder's proposals and of the denoising queries.
    names = ["loss_cls", "d0.loss_cls", "enc_loss_cls", "dn_loss_cls", "d0.dn_loss_cls"]
    assert set(names) < set(values)
    total.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    if any(lesions):
        untouched = [n for n, p in model.named_parameters() if not p.grad.abs().sum()]
        assert not any("backbone" in n or "neck" in n for n in untouched), untouched


@pytest.mark.slow
def test_it_learns_one_batch(model):
    batch = batch_of(model.train(), (1, 1), ((96, 96), (96, 96)))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5  # the running statistics follow within the few steps
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    torch.manual_seed(0)
    for _ in range(60):
        losses, _ = model.parse_losses(model(**batch, mode="loss"))
        optimizer.zero_grad()
        losses.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model(**batch, mode="predict")
    for sample in found:
        best = sample.pred_instances[0]
        left, top, right, bottom = best.bboxes[0].tolist()
        width = min(right, 40) - max(left, 16)
        height = min(bottom, 44) - max(top, 20)
        common = max(width, 0) * max(height, 0)
        assert common / ((right - left) * (bottom - top) + 24 * 24 - common) > 0.5


def test_inference_is_what_is_trained(model):
    model.eval()
    inputs = batch_of(model, training=False)["inputs"]
    recorded = model.extract_feat(inputs)
    with torch.no_grad():
        inferred = model.extract_feat(inputs)  # stack by stack, norms folded, in pieces
    for one, other in zip(inferred, recorded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_slices_in_common_go_through_the_stem_once(model):
    model.eval()
    assert model.shares_slices
    stacks = torch.tensor([[0, 1, 2], [1, 2, 3], [3, 3, 2]])
    batch = SharedSlices(torch.randn(4, 1, 96, 96) * 50, stacks, torch.tensor([1.0, 5.0, 2.0]))
    with torch.no_grad():
        got, expected = model.extract_feat(batch), model.extract_feat(batch.volumes())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())

    class Custom(KeySliceDINO):
        def predict(self, batch_inputs, *args, **kwargs):
            return batch_inputs

    model.__class__ = Custom
    assert not model.shares_slices


def test_a_volume_slice_by_slice(config, tmp_path):
    checkpoint = write_checkpoint(config, tmp_path / "epoch_1.pth")
    detector = LesionDetector(config, checkpoint, "cpu")
    volume = volume_of(body_of(6))
    options = dict(interval_mm=1.0, progress=False)
    by_two = detector.detect_slices(volume, batch_size=2, **options)
    by_four = detector.detect_slices(volume, batch_size=4, **options)
    assert len(by_two) == 6 and sum(len(each.boxes) for each in by_two) > 6
    for one, other in zip(by_two, by_four, strict=True):
        assert one.masks is None or not one.masks
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_fewer_places_than_queries_are_named():
    model = built(small_config(**{"model.num_queries": 200})).eval()
    with pytest.raises(UserError, match=r"num_queries=200, .* have 189 places .*resize.size"):
        model(**batch_of(model, (0,), ((96, 96),), False), mode="predict")


def test_operations_by_formula(config):
    parts = detector_complexity(config, 96)
    assert list(parts) == ["backbone", "neck", "transformer"]
    model = built(config)
    own = [p for n, p in model.named_parameters() if not n.startswith(("backbone", "neck"))]
    assert parts["transformer"].parameters == sum(p.numel() for p in own)
    c, hidden, queries, heads = 64, 256, 20, 4
    samples = heads * 3 * 4  # levels, points
    places = 12**2 + 6**2 + 3**2
    box = 2 * c**2 + 4 * c  # the perceptron that refines a box
    encoder = places * (2 * c**2 + 3 * samples * c + 2 * c * hidden)
    proposals = places * (c**2 + c + box)
    layer = queries * (4 * c**2 + 2 * queries * c)  # attention among the queries
    layer += places * c**2 + queries * (c**2 + 3 * samples * c)  # to the maps
    layer += queries * (2 * c * hidden + (4 * c) * c + c**2 + box)  # and where the query lies
    head = queries * (c + box)
    matrices = encoder + proposals + 2 * (layer + head)
    # Single products too: of samples with their weights, offsets, encodings.
    counted = parts["transformer"].multiply_adds
    assert matrices < counted < 1.1 * matrices


def test_the_config_check_knows_the_necks_options():
    with pytest.raises(ConfigError, match=r"did you mean model.neck.first_level\?"):
        small_config(**{"model.neck.first_levl": 0})
    with pytest.raises(ConfigError, match=r"did you mean model.num_queries"):
        small_config(**{"model.num_querys": 10})


@pytest.mark.slow
def test_training_goes_on_exactly(phantom, tmp_path):
    """Interrupted in the middle of an epoch. The denoising queries are drawn anew in every step."""
    names = itertools.count()

    def run(folder, resume=None):
        config = small_config(
            **{
                "train_cfg.max_epochs": 2,
                "train_dataloader.num_workers": 0,
                "val_dataloader.num_workers": 0,
                "default_hooks.checkpoint.by_epoch": False,
                "default_hooks.checkpoint.interval": 2,
                "default_hooks.checkpoint.max_keep_ckpts": -1,
                "visualizer.vis_backends": [],
            }
        )
        config.work_dir, config.launcher = str(folder), "none"
        config.experiment_name = f"dino_{next(names)}"
        for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
            config[loader].dataset.data_root = str(phantom)
        train(config, resume)
        return max(folder.glob("iter_*.pth"), key=lambda p: int(p.stem[5:]))

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight/iter_2.pth"))
    assert straight.name == resumed.name
    one, two = load_checkpoint_file(straight), load_checkpoint_file(resumed)
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    losses = [each["message_hub"]["log_scalars"]["train/loss"]["values"] for each in (one, two)]
    assert np.array_equal(*losses) and len(losses[0]) > 3
