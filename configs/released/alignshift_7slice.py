# AlignShift x7 as released: border slices are left as they are, not padded with zeros.
_base_ = "alignshift_3slice.py"
stack = dict(num_slices=7)
