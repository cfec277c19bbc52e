# DINO on a phantom: the detector of dino_3slice.py, narrower, of half as many layers and on smaller
# images, from random weights. The backbone is that of configs/demo, with AlignShift as `make demo`.
_base_ = ["../dino/dino_3slice.py", "../_base_/from_scratch.py"]
channels = 64
resize = dict(size=192, prob=0.3)
stack = dict(policy="keep_thick")

attention = dict(embed_dims=channels, num_heads=4)
ffn = dict(embed_dims=channels, feedforward_channels=256)
model = dict(
    data_preprocessor=dict(low=-250, high=350),
    backbone=dict(
        fusion=dict(_delete_=True, type="AlignShiftConv", n_fold=8, ref_thickness=2.0),
        growth=12,
        bn_size=2,
        block_config=(4, 6, 8),
        stem_channels=24,
        with_cp=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=(72, 108, 150), out_channels=channels, norm_cfg=dict(num_groups=8)),
    num_queries=50,
    encoder=dict(num_layers=3, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
    decoder=dict(
        num_layers=3,
        layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn),
    ),
    positional_encoding=dict(num_feats=channels // 2),
    bbox_head=dict(embed_dims=channels),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
)

auto_scale_lr = dict(base_batch_size=4)
train_dataloader = dict(batch_size=4, num_workers=1)
val_dataloader = dict(num_workers=1)
test_dataloader = dict(num_workers=1)

epochs = 20
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=1e-2),
    paramwise_cfg=dict(
        custom_keys=dict(backbone=dict(lr_mult=2.0), sampling_offsets=dict(lr_mult=0.1))
    ),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [_base_.warm_up, dict(_base_.cosine, T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs, val_interval=10)
default_hooks = dict(logger=dict(interval=20))
