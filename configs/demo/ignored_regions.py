# The demo's detector on training data with regions to ignore, as tools/mine_lesions.py writes them.
# Without such regions it learns the same as nofusion_3slice.py.
_base_ = "nofusion_3slice.py"
ignoring = dict(type="IgnoringAssigner", ignore_iof_thr=0.5)
model = dict(train_cfg=dict(rpn=dict(assigner=ignoring), rcnn=dict(assigner=ignoring)))
