"""Names of the formats that data sets are written in, for command lines, which need no numpy to say them."""

FORMATS = ("kaggle", "kaggle_old", "supervisely", "label_png", "coco")
