# Liver and lesions by a narrow ACS DeepLab on a phantom LiTS of 128 px: the recipe of
# configs/acs_volumes/lits_acs.py in minutes on a processor.
_base_ = "../acs_volumes/lits_acs.py"
model = dict(
    network=dict(depth=18, base_channels=16, channels=32, rates=[1, 2, 4], dropout=0.1),
    test_cfg=dict(window=[32, 128, 128], step=[12, 128, 128]),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    dataset=dict(
        pipeline=[
            dict(type="RandomScaledCrop", size=[32, 96, 96]),
            dict(type="RandomFlipsAndTurns"),
            _base_.window,
            dict(type="PackVolume"),
        ]
    ),
)
epochs = 40
param_scheduler = [
    dict(type="MultiStepLR", by_epoch=True, milestones=[epochs // 2, epochs * 3 // 4], gamma=0.1)
]
train_cfg = dict(max_epochs=epochs)
auto_scale_lr = dict(base_batch_size=2)
default_hooks = dict(checkpoint=dict(interval=10), logger=dict(interval=10))
