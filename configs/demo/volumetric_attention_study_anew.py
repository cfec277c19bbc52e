# The second part of the study of docs/study/volumetric_attention.md: RPN and RCNN learn from random
# weights with the attention from the start, its gates at 0.5 as printed.
_base_ = "volumetric_attention_study.py"

model = dict(
    rpn_head=dict(init_cfg=dict(_delete_=True, type="Normal", layer="Conv2d", std=0.01)),
    roi_head=dict(bbox_head=dict(init_cfg=None)),  # then it draws its own
    attention=dict(initial_gate=0.5),
)

epochs = 4
optim_wrapper = dict(
    optimizer=dict(lr=2e-3),
    paramwise_cfg=dict(
        custom_keys=dict(
            rpn_head=dict(lr_mult=1.0), roi_head=dict(lr_mult=1.0), attention=dict(lr_mult=1.0)
        )
    ),
)
param_scheduler = [dict(_base_.warm_up, end=15), dict(_base_.cosine, T_max=epochs, end=epochs)]
train_cfg = dict(max_epochs=epochs)
