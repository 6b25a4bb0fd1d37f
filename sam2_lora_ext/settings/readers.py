"""The rows of the readers of annotations, one for each format."""

from collections.abc import Mapping
from typing import Any

from sam2_lora_ext.settings.containers import ListOf, MapOf, Nullable, Section
from sam2_lora_ext.settings.data import CLASS, CLASSES, EXIF, FULL_CHECK, PATH, PIXELS
from sam2_lora_ext.settings.kinds import Flag, Text, Whole, shown

COLOUR = ListOf(Whole(0, 255), least=3, most=3)
READER = {"classes": CLASSES, "full_check": FULL_CHECK, "exif": EXIF}


def distinct_names(section: Mapping[str, Any]) -> str | None:
    """Each class has a different name."""
    classes = section.get("classes")
    names = list(classes.values()) if isinstance(classes, Mapping) else classes if isinstance(classes, list) else [""]
    if not names or len(set(names)) < len(names):
        return f"classes must be at least one, each with a unique name, got {shown(classes)}"
    return None


def distinct_colours(section: Mapping[str, Any]) -> str | None:
    """Each class has a different colour, and none is black."""
    colours, classes = section.get("colors"), section.get("classes")
    if colours is None:
        return None
    count = len(classes) if isinstance(classes, (list, Mapping)) else classes or 4
    numbers = classes if isinstance(classes, Mapping) else range(1, 1 + count)
    taken = [tuple(colour) for colour in colours.values()]
    if set(colours) != set(numbers) or (0, 0, 0) in taken or len(set(taken)) < len(taken):
        wanted = f"each of the classes {shown(list(numbers))} a unique colour that is not black"
        return f"colors must give {wanted}, got {shown(dict(colours))}"
    return None


DATA = "sam2_lora_ext.data"
TARGETS = {
    f"{DATA}.kaggle.KaggleReader": Section(
        {
            "image_dir": PATH,
            "csv": PATH,
            "size": Nullable(ListOf(Whole(1, PIXELS), least=2, most=2)),
            **READER,
        },
        required=("image_dir", "csv"),
        rules=(distinct_names,),
    ),
    f"{DATA}.label_png.LabelPNGReader": Section(
        {
            "image_dir": PATH,
            "label_dir": PATH,
            "colors": Nullable(MapOf(CLASS, COLOUR, most=32767)),
            **READER,
        },
        required=("image_dir", "label_dir"),
        rules=(distinct_names, distinct_colours),
    ),
    f"{DATA}.supervisely.SuperviselyReader": Section(
        {
            "root": PATH,
            "split": Nullable(Text(longest=300)),
            **READER,
        },
        required=("root",),
        rules=(distinct_names,),
    ),
    f"{DATA}.coco.COCOReader": Section(
        {
            "image_dir": PATH,
            "json": PATH,
            "crowd": Flag(),
            **READER,
        },
        required=("image_dir", "json"),
        rules=(distinct_names,),
    ),
}
