"""The commands. In a wheel, and in an editable installation, they are mmdet_ext.tools."""
