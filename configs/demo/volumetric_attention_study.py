# Variants of volumetric attention side by side on a phantom, docs/study/volumetric_attention.md. As
# short as one processor core needs it: attention is put into a detector of the target image alone,
# trained by volumetric_attention.py, and what follows the backbone is trained on.
_base_ = "volumetric_attention.py"
pretrained = "{{$PRETRAINED:work_dirs/va_study/pretraining/epoch_10.pth}}"
trained = dict(type="Pretrained", checkpoint=pretrained)

model = dict(
    backbone=dict(
        type="ResNet",  # TorchvisionResNet takes torchvision's files alone
        frozen_stages=4,
        norm_eval=True,
        init_cfg=dict(_delete_=True, prefix="backbone.", **trained),
    ),
    neck=dict(init_cfg=dict(prefix="neck.", **trained)),
    rpn_head=dict(init_cfg=dict(prefix="rpn_head.", **trained)),
    roi_head=dict(bbox_head=dict(init_cfg=dict(prefix="roi_head.bbox_head.", **trained))),
    attention=dict(initial_gate=0.9),  # gates of 0.5 quarter the maps that the heads know
    train_cfg=dict(rpn_proposal=dict(nms_pre=150, max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=150, max_per_img=50), rcnn=dict(max_per_img=20)),
)

train_dataloader = dict(dataset=dict(ann_file=["annotations/train.json", "annotations/val.json"]))
test_dataloader = dict(batch_size=8)

epochs = 2
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(custom_keys=dict(attention=dict(lr_mult=10.0))),  # it alone is new
)
param_scheduler = [dict(_base_.warm_up, end=15), dict(_base_.cosine, T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs)
default_hooks = dict(logger=dict(interval=10))
