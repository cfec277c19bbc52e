# A whole experiment on 3 slices without context fusion: the others replace the fusion operator.
_base_ = ["mask_rcnn_densenet121.py", "deeplesion.py", "schedule_20e.py", "default_runtime.py"]
