# How the small networks of configs/demo learn from random weights: Adam gets there in fewer steps
# than SGD; what has no normalisation follows more slowly than the backbone. An experiment takes
# `adam` as its optim_wrapper, and of the rate's course, as long as its epochs,
# [warm_up, dict(cosine, T_max=epochs, end=epochs)].
slower = dict(lr_mult=0.5)
adam = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=2e-3, weight_decay=1e-2),
    paramwise_cfg=dict(custom_keys=dict(neck=slower, rpn_head=slower, roi_head=slower)),
    clip_grad=dict(max_norm=5),
)
warm_up = dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=60)
cosine = dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True)
