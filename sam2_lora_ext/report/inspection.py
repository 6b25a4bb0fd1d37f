"""The report's section about inspection without clicks: numbers, found, missed and false strips, pictures."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sam2_lora_ext.inspection.showing import BY_CLASS, KINDS, OVERALL, short, shown
from sam2_lora_ext.report.html import folded, picture, table
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, inside, read_json

LEGEND = "The truth (green) below the result (blue), or a false alarm (orange)."


@dataclass
class InspectionResult:
    """One inspection.json and the folder of its pictures."""

    folder: Path
    record: dict[str, Any]


def read_inspection(path: Path) -> InspectionResult:
    """Reads a folder written by tools/evaluate_inspection.py, or its inspection.json.

    Raises:
        UserError: inspection.json is missing or damaged.
    """
    file = path / "inspection.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no {file}: create it with tools/evaluate_inspection.py")
    record = read_json(file, LARGEST_NOTE)
    if not isinstance(record, dict) or not {"result", "gallery", "strips", "command"} <= set(record):
        raise UserError(f"{file} was not written by tools/evaluate_inspection.py: give the folder of an inspection")
    return InspectionResult(file.parent, record)


def inspection(found: InspectionResult) -> str:
    """The section as HTML.

    Raises:
        UserError: a picture is missing.
    """
    record, result = found.record, found.record["result"]
    fitted = "thresholds fitted on validation strips" if result["decision"]["fitted"] else "thresholds not fitted"
    said = (
        f"{result['strips']} strips, {result['clean_strips']} of them clean: {record['strips']['origin']}. "
        f"No clicks; {fitted}; {result['ms_per_strip']:.1f} ms per strip on {record['device']}."
    )
    parts = ["<h2>Inspection without clicks</h2>", f"<p>{escape(said)}</p>"]
    rows = [[title, shown(result[key])] for key, title in OVERALL.items()]
    parts.append(table(["", str(record["checkpoint"])], rows))
    rows = [
        [name, *[row[kind] for kind in KINDS], *[short(row[key]) for key in BY_CLASS]]
        for name, row in result["classes"].items()
    ]
    parts += ["<h3>By class</h3>", table(["", *(f"{kind} strips" for kind in KINDS), *BY_CLASS.values()], rows)]
    rows = [
        [name, row["objects"], shown(row["recall_iou_10"]), shown(row["recall_iou_50"])]
        for name, row in result["objects"].items()
    ]
    parts += ["<h3>True defects by size</h3>", table(["", "number", "found, IoU 0.1", "found, IoU 0.5"], rows)]
    for name in result["classes"]:
        body = ""
        for kind in KINDS:
            entries = [entry for entry in record["gallery"] if entry["class"] == name and entry["kind"] == kind]
            shots = "".join(picture(inside(found.folder, entry["file"]), entry["caption"]) for entry in entries)
            body += f'<h3>{kind.capitalize()}</h3><div class="pictures">{shots}</div>' if shots else ""
        if body:
            parts.append(folded(name, body))
    return "".join(parts) + f"<p class=soft>{LEGEND}</p>"
