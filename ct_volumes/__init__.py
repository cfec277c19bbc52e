"""Whole CT volumes: in (DICOM, NIfTI), lesions in 3D, out (DICOM SR and SEG, NIfTI, JSON, page)."""
