# What every experiment shares: registration, hooks, logging, seeds.
default_scope = "mmdet"
custom_imports = dict(
    imports=[
        "mmdet_ext.datasets.deeplesion",
        "mmdet_ext.datasets.sampler",
        "mmdet_ext.datasets.transforms",
        "mmdet_ext.engine.distributed",
        "mmdet_ext.engine.hooks",
        "mmdet_ext.engine.loop",
        "mmdet_ext.evaluation.froc_metric",
        "mmdet_ext.models.densenet",
        "mmdet_ext.models.detectors",
        "mmdet_ext.models.losses",
        "mmdet_ext.models.neck",
        "mmdet_ext.models.preprocessor",
        "mmdet_ext.models.resnet",
        "mmdet_ext.models.slice_groups",
    ],
    allow_failed_imports=False,
)

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="UpdateSchedulerHook"),  # a warm-up counts updates, not iterations
    # The model is chosen on val, by the mean sensitivity at 0.5, 1, 2 and 4 false positives.
    checkpoint=dict(
        type="ResumableCheckpointHook",
        interval=1,
        max_keep_ckpts=2,
        save_best="FROC/average",
        rule="greater",
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    # Of several processes with plain BatchNorm each has its own running statistics.
    sync_buffers=dict(type="SyncBuffersHook"),
    finite_loss=dict(type="FiniteLossHook"),
    # Warns of losses that are not those of sound runs; `tools/check_run.py WORK_DIR` shows them.
    run_check=dict(type="RunCheckHook", reference="deeplesion"),
)

env_cfg = dict(
    cudnn_benchmark=True,  # every batch has the same shape
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),  # without a GPU it is gloo
)
# Several processes; on GPUs BatchNorm is synchronised.
model_wrapper_cfg = dict(type="DataParallelDetector", sync_bn=True)

visualizer = dict(
    type="DetLocalVisualizer",
    vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)
log_level = "INFO"
randomness = dict(seed=0)
load_from = None
resume = False
