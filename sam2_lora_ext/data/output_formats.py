"""Names of the output formats of data sets, for command lines that must not import numpy."""

OUTPUT_FORMATS = ("kaggle", "kaggle_old", "supervisely", "label_png", "coco")
