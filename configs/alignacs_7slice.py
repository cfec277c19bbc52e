# AlignACS x7: ACS with the virtual slices of AlignShift, in no paper. The schedule is ACS's.
_base_ = "alignacs_3slice.py"
stack = dict(num_slices=7)
