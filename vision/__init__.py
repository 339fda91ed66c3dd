"""LarvSeg, large-vocabulary segmentation. Its system is not in this release yet."""
