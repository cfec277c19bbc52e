# Variants of volumetric attention side by side on a phantom, docs/study/volumetric_attention.md. As
# short as one processor core needs it: backbone and pyramid begin with the weights of a detector of
# the target image alone, trained by volumetric_attention.py. The first stage and the backbone's
# BatchNorm statistics stay as they are, as in the experiments. RPN, RCNN and attention begin anew.
_base_ = "volumetric_attention.py"
pretrained = "{{$PRETRAINED:work_dirs/va_study/pretraining/epoch_10.pth}}"

model = dict(
    backbone=dict(
        type="ResNet",  # TorchvisionResNet takes torchvision's files alone
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(_delete_=True, type="Pretrained", checkpoint=pretrained, prefix="backbone."),
    ),
    neck=dict(init_cfg=dict(type="Pretrained", checkpoint=pretrained, prefix="neck.")),
    train_cfg=dict(rpn_proposal=dict(nms_pre=150, max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=150, max_per_img=50), rcnn=dict(max_per_img=20)),
)

train_dataloader = dict(dataset=dict(ann_file=["annotations/train.json", "annotations/val.json"]))
test_dataloader = dict(batch_size=8)

epochs = 2
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=15),
    dict(
        type="CosineAnnealingLR",
        by_epoch=True,
        T_max=epochs,
        end=epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=epochs)
default_hooks = dict(logger=dict(interval=10))
