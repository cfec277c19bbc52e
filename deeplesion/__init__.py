"""The DeepLesion benchmark: annotations, slices, RECIST masks, phantom, FROC."""
