"""Names of the output formats of data sets, for command lines that must not import numpy."""

FORMATS = ("kaggle", "kaggle_old", "supervisely", "label_png", "coco")
