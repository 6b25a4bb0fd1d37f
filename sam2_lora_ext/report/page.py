"""Builds the page of the report from runs and evaluations, section by section."""

import shlex
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from sam2_lora_ext.report.adapter_stats import Change, adapter_changes, by_block, weight_changes
from sam2_lora_ext.report.collect import Evaluation, Run, understood
from sam2_lora_ext.report.curves import bars, plot
from sam2_lora_ext.report.html import figure, folded, page, picture, table
from sam2_lora_ext.report.inspection import InspectionResult, inspection
from sam2_lora_ext.report.numbers import tables
from sam2_lora_ext.report.repeat import data_of, training_command, use_commands
from sam2_lora_ext.utils.files import inside

LEGEND = (
    "The truth (green) and the one-click mask (blue) with its click (red); on clean steel the false alarm (orange)."
)


def render(runs: Sequence[Run], evaluations: Sequence[Evaluation], inspections: Sequence[InspectionResult] = ()) -> str:
    """The whole page as HTML.

    Raises:
        UserError: a file of a run or an evaluation has unexpected content.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{escape(title)}</h1>"]
    with understood(f"training_summary.json or lora.json in {', '.join(str(run.path) for run in runs)}"):
        parts += [facts(runs), curves(runs)]
    for evaluation in evaluations:
        with understood(f"{evaluation.folder / 'evaluation.json'}"):
            parts += [tables(evaluation), galleries(evaluation)]
    for result in inspections:
        with understood(f"{result.folder / 'inspection.json'}"):
            parts.append(inspection(result))
    if not evaluations and not inspections:
        parts.append("<h2>Evaluation</h2><p>There is none yet; the command is at the end of this page.</p>")
    parts += [adaptation(runs), reproduce(runs, [*evaluations, *inspections])]
    return page(title, "\n".join(parts))


def facts(runs: Sequence[Run]) -> str:
    """Model, data, duration and results of each training."""

    def row(name: str, value: Callable[[Run], Any]) -> list[Any]:
        return [name, *[value(run) for run in runs]]

    def of(run: Run, key: str, form: str = "{}") -> str:
        value = run.summary.get(key)
        return "-" if value is None else form.format(value)

    def best(run: Run) -> str:
        entry, monitor = run.summary.get("best"), run.summary.get("monitor")
        return f"{monitor} {entry['metrics'][monitor]:.4f} at step {entry['step']}" if entry else "-"

    def trained(run: Run) -> str:
        if "trained" not in run.lora:
            return "-"
        return f"{run.lora['trained']:,} of {run.lora['total']:,} ({run.lora['share']:.2%})"

    def state(run: Run) -> str:
        if not run.summary:
            return f"not finished: extended after its end at step {run.extended}" if run.extended else "not finished"
        reason = run.summary.get("stop_reason") or "reason not recorded"
        return f"stopped early: {reason}" if run.summary.get("stopped_early") else "finished"

    def versions(run: Run) -> str:
        found = run.summary.get("versions", {})
        return ", ".join(f"{name} {version}" for name, version in found.items() if version) or "-"

    def base(run: Run) -> str:
        return f"{run.lora.get('base_path') or '-'} (sha256 {str(run.lora.get('base_id'))[:12]})"

    rows = [
        row("name", lambda run: run.name),
        row("folder", lambda run: run.path),
        row("state", state),
        row("config", lambda run: of(run, "config")),
        row("model", lambda run: run.lora.get("model_config") or "-"),
        row("method", method),
        row("trained parameters", trained),
        row("data", data_of),
        row("steps", lambda run: of(run, "steps")),
        row("learning rate", lambda run: of(run, "learning_rate", "{:g}")),
        row("seed", lambda run: of(run, "seed")),
        row("processes", lambda run: of(run, "world_size")),
        row("best validation", best),
        row("time", lambda run: of(run, "wall_seconds", "{:,.0f} s")),
        row("base", base),
        row("versions", versions),
        row("commit", lambda run: of(run, "git_commit")),
    ]
    return "<h2>Run</h2>" + table(["", *[run.label for run in runs]], rows, wrap=True)


def method(run: Run) -> str:
    """The training method in words."""
    if not run.lora:
        return "-"
    config, groups = run.lora.get("config"), run.lora.get("groups") or {}
    if not config:
        return "full fine-tuning"
    words = []
    if config["targets"]:
        kind = {"dora": "DoRA", "pissa": "PiSSA"}.get(config.get("variant"), "rsLoRA" if config["rslora"] else "LoRA")
        words.append(f"{kind}, rank {config['rank']}, alpha {config['alpha']:g}, dropout {config['dropout']:g}")
    if full := groups.get("full modules"):
        words.append(f"{len(full['layers'])} modules in full")
    return "; ".join(words)


def curves(runs: Sequence[Run]) -> str:
    """The curves of loss, IoU and learning rate."""
    phases = (("training", "train"), ("validation", "val"))
    loss = {(run.label, phase): run.curve(key, "loss") for run in runs for phase, key in phases}
    prompts = (("1 click", "iou_1click"), ("8 clicks", "iou_8clicks"), ("box", "iou_box"))
    quality = {(run.label, what): run.curve("val", column) for run in runs for what, column in prompts}
    rate = {(run.label, "learning rate"): run.curve("train", "learning_rate") for run in runs}
    plots = [
        plot(loss, "Loss", "loss", log=True),
        plot(quality, "IoU on the validation set", "mean IoU"),
        plot(rate, "Learning rate", "learning rate"),
    ]
    shown = "".join(figure(svg) for svg in plots)
    return "<h2>Curves</h2>" + (f'<div class="plots">{shown}</div>' if shown else "<p>Nothing has been logged yet.</p>")


def galleries(evaluation: Evaluation) -> str:
    """Best, median and worst one-click masks and false alarms; only the second of several models is unfolded."""
    models = [model for model in evaluation.record["models"] if model["gallery"]]
    parts = []
    for number, model in enumerate(models):
        kinds: dict[str, list[str]] = {}
        for entry in model["gallery"]:
            shown = picture(inside(evaluation.folder, entry["file"]), entry["caption"])
            kinds.setdefault(entry["kind"], []).append(shown)
        body = "".join(
            f'<h3>{escape(kind.capitalize())}</h3><div class="pictures">{"".join(shown)}</div>'
            for kind, shown in kinds.items()
        )
        parts.append(folded(model["name"], body, unfolded=number == min(1, len(models) - 1)))
    return f"<h2>Pictures</h2><p class=soft>{LEGEND}</p>{''.join(parts)}" if parts else ""


def adaptation(runs: Sequence[Run]) -> str:
    """The updates of each run by layer and block."""
    parts = ["<h2>Updates by layer</h2>"]
    for run in runs:
        sentence, rows = changes(run)
        parts.append(f"<p>{escape(run.label)}: {escape(sentence)}</p>")
        if not rows:
            continue
        lines = [[row.name, f"{row.norm:.4g}", "-" if row.relative is None else f"{row.relative:.2%}"] for row in rows]
        details = table(["layer", "norm of the update", "relative to the weight"], lines)
        parts.append(f'<div class="tall">{figure(bars(by_block(rows), f"Update by block: {run.label}"))}</div>')
        parts.append(folded(f"All {len(rows)} layers", details))
    return "".join(parts)


def changes(run: Run) -> tuple[str, list[Change]]:
    """A sentence about the comparison with the base, and the update of each layer."""
    base = run.base()
    if found := run.adapter():
        kind, adapter = found
        if base is not None and adapter.misfit(base) is None:
            return f"adapter {kind}, relative to the base.", adapter_changes(adapter, base)
        note = f"adapter {kind}. The base is no longer at {run.lora.get('base_path')}, so norms are absolute."
        return note, adapter_changes(adapter, None)
    if found := run.weights():
        kind, state = found
        if base is not None and {key: value.shape for key, value in base.items()} == {
            key: value.shape for key, value in state.items()
        }:
            return f"weights {kind}, relative to the base.", weight_changes(state, base)
        return f"the base is no longer at {run.lora.get('base_path')}, so the weights cannot be compared.", []
    return "the run has no adapter and no weights yet.", []


def reproduce(runs: Sequence[Run], evaluations: Sequence[Evaluation | InspectionResult]) -> str:
    """The commands that repeat the runs and their evaluations."""
    lines = [line for run in runs for line in (training_command(run), *use_commands(run)) if line]
    lines += [shlex.join(evaluation.record["command"]) for evaluation in evaluations if "command" in evaluation.record]
    return "<h2>Commands to repeat it</h2>" + "".join(f"<pre>{escape(line)}</pre>" for line in dict.fromkeys(lines))
