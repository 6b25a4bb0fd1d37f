"""Titles of the metrics of an evaluation, and the metrics of each table."""

from sam2_lora_ext.evaluate.protocol import Protocol
from sam2_lora_ext.evaluate.tables import GOALS

FEWER_IS_BETTER = ("clicks_to", "missed", "false_alarms")
SIZES_TITLE = "By size of the object (small below 32², large from 96² pixels of the strip)"
OTHER_TITLE = "Clean steel, Kaggle's mean Dice with classes given by the prompt, speed"
OTHER = {"auroc": "AUROC of the object score", "false_alarms": "false alarms at 95 % recall"}


def prompt_title(prompt: str) -> str:
    """`8 clicks`, `box`, `box ±5 %`."""
    if prompt.startswith("box_"):
        return f"box ±{prompt.removeprefix('box_')} %"
    return prompt.replace("click", " click")


def headline(protocol: Protocol) -> dict[str, str]:
    """The metrics of the main table and their titles."""
    titles = {f"iou_{prompt}": f"IoU {prompt_title(prompt)}" for prompt in protocol.prompts}
    for goal in GOALS:
        titles[f"clicks_to_{round(100 * goal)}"] = f"clicks to {goal:.2f} (at most {protocol.max_clicks})"
        titles[f"missed_{round(100 * goal)}"] = f"{goal:.2f} missed, share"
    return titles | ({"automatic_recall": "automatic recall at 0.50"} if protocol.automatic else {})


def details(protocol: Protocol) -> dict[str, str]:
    """Dice and boundary F at each prompt."""
    kinds = (("dice", "Dice"), ("boundary", f"boundary F, {protocol.tolerance} px,"))
    return {
        f"{kind}_{prompt}": f"{title} {prompt_title(prompt)}" for kind, title in kinds for prompt in protocol.prompts
    }


def overview(protocol: Protocol) -> dict[str, str]:
    """The few metrics in the overview of a comparison, and their titles."""
    first, last = protocol.prompts[0], protocol.prompts[len(protocol.clicks) - 1]
    wanted = dict.fromkeys([f"iou_{first}", f"iou_{last}", "iou_box", "boundary_box", "clicks_to_80"])
    titles = headline(protocol) | details(protocol)
    return {key: titles[key] for key in wanted}


def grouped(protocol: Protocol) -> dict[str, str]:
    """The metrics of the tables by class and size, and their titles."""
    return {
        key: title
        for key, title in headline(protocol).items()
        if key.startswith(("iou_", "automatic")) and "±" not in title
    } | {"boundary_box": details(protocol)["boundary_box"]}
