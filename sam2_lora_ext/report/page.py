"""The sections of the report, put together from runs and evaluations."""

import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

from sam2_lora_ext.report.adapter_stats import block_changes, layer_changes
from sam2_lora_ext.report.collect import Evaluation, Run
from sam2_lora_ext.report.commands import training_command, use_commands
from sam2_lora_ext.report.curves import bars, plot
from sam2_lora_ext.report.html import figure, page, picture, table
from sam2_lora_ext.report.numbers import tables


def render(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> str:
    """The page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{escape(title)}</h1>", facts(runs), curves(runs)]
    for evaluation in evaluations:
        parts += [tables(evaluation), galleries(evaluation)]
    if not evaluations:
        parts.append("<h2>Evaluation</h2><p>There is none yet; the command to make it stands at the end.</p>")
    parts += [adaptation(runs), reproduce(runs, evaluations)]
    return page(title, "\n".join(parts))


def facts(runs: Sequence[Run]) -> str:
    """What was trained, on what, how long, and what came out."""

    def row(name: str, value: Any) -> list[Any]:
        return [name, *[value(run) for run in runs]]

    def of(run: Run, key: str, form: str = "{}") -> str:
        value = run.summary.get(key)
        return "-" if value is None else form.format(value)

    def lora(run: Run) -> str:
        config = run.lora.get("config")
        return (
            f"rank {config['rank']}, alpha {config['alpha']:g}, dropout {config['dropout']:g}"
            if config
            else "none (all parameters)"
        )

    def best(run: Run) -> str:
        entry = run.summary.get("best")
        monitor = run.summary.get("monitor")
        return f"{monitor} {entry['metrics'][monitor]:.4f} at step {entry['step']}" if entry else "-"

    def trained(run: Run) -> str:
        return (
            f"{run.lora['trained']:,} of {run.lora['total']:,} ({run.lora['share']:.2%})"
            if "trained" in run.lora
            else "-"
        )

    def state(run: Run) -> str:
        if not run.summary:
            return "not finished"
        return (
            f"stopped early: {run.summary.get('stop_reason') or 'no reason kept'}"
            if run.summary.get("stopped_early")
            else "finished"
        )

    rows = [
        row("state", state),
        row("model", lambda run: run.lora.get("model_config") or "-"),
        row("LoRA", lora),
        row("trained parameters", trained),
        row("steps", lambda run: of(run, "steps")),
        row("learning rate", lambda run: of(run, "learning_rate", "{:g}")),
        row("seed", lambda run: of(run, "seed")),
        row("best validation", best),
        row("time", lambda run: of(run, "wall_seconds", "{:,.0f} s")),
        row("base", lambda run: f"{run.lora.get('base_path') or '-'} (sha256 {str(run.lora.get('base_id'))[:12]})"),
        row(
            "versions",
            lambda run: (
                ", ".join(f"{name} {version}" for name, version in run.summary.get("versions", {}).items() if version)
                or "-"
            ),
        ),
        row("commit", lambda run: of(run, "git_commit")),
    ]
    return "<h2>Run</h2>" + table(["", *[run.name for run in runs]], rows)


def curves(runs: Sequence[Run]) -> str:
    """Loss, IoU and learning rate."""
    many = len(runs) > 1

    def name(run: Run, what: str) -> str:
        return f"{run.path.name}, {what}" if many else what

    loss = {
        name(run, phase): run.curve(key, "loss")
        for run in runs
        for phase, key in (("training", "train"), ("validation", "val"))
    }
    quality = {
        name(run, what): run.curve("val", column)
        for run in runs
        for what, column in (("1 click", "iou_1click"), ("8 clicks", "iou_8clicks"), ("box", "iou_box"))
    }
    rate = {name(run, "learning rate"): run.curve("train", "learning_rate") for run in runs}
    plots = [
        plot(loss, "Loss", "loss", log=True),
        plot(quality, "IoU on the validation set", "mean IoU"),
        plot(rate, "Learning rate", "learning rate"),
    ]
    shown = "".join(figure(svg) for svg in plots)
    return (
        f'<h2>Curves</h2><div class="plots">{shown}</div>'
        if shown
        else "<h2>Curves</h2><p>Nothing has been logged yet.</p>"
    )


def galleries(evaluation: Evaluation) -> str:
    """Best, median, worst masks of one click, and false alarms; the first model's are folded where there are others."""
    models = [model for model in evaluation.record["models"] if model["gallery"]]
    parts = []
    for number, model in enumerate(models):
        shown = []
        for kind in dict.fromkeys(entry["kind"] for entry in model["gallery"]):
            pictures = "".join(
                picture(evaluation.folder / entry["file"], entry["caption"])
                for entry in model["gallery"]
                if entry["kind"] == kind
            )
            shown.append(f'<h3>{escape(kind.capitalize())}</h3><div class="pictures">{pictures}</div>')
        unfolded = " open" if number == min(1, len(models) - 1) else ""
        parts.append(f"<details{unfolded}><summary>{escape(model['name'])}</summary>{''.join(shown)}</details>")
    note = "<p class=soft>The truth (green), then the mask of one click (blue, the click red); on clean steel what was taken for a defect (orange).</p>"
    return f"<h2>Pictures</h2>{note}{''.join(parts)}" if parts else ""


def adaptation(runs: Sequence[Run]) -> str:
    """Where each adapter changed its base."""
    parts = ["<h2>Where the adaptation happened</h2>"]
    for run in runs:
        found = run.adapter()
        if found is None:
            parts.append(f"<p>{escape(run.name)} has no adapter.</p>")
            continue
        kind, adapter = found
        base = run.base()
        fits = base is not None and adapter.misfit(base) is None
        note = "" if fits else " The base is not where it was, so norms are absolute."
        blocks, layers = (change(adapter, base if fits else None) for change in (block_changes, layer_changes))
        rows = [[row.name, f"{row.norm:.4g}", "-" if row.relative is None else f"{row.relative:.2%}"] for row in layers]
        parts.append(
            f'<p>{escape(run.name)}, adapter {kind}.{note}</p><div class="tall">{figure(bars(blocks, f"Update by block: {run.path.name}"))}</div>'
            f"<details><summary>All {len(rows)} layers</summary>{table(['layer', 'norm of the update', 'relative to the weight'], rows)}</details>"
        )
    return "".join(parts)


def reproduce(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> str:
    """The exact commands."""
    lines = [line for run in runs for line in (training_command(run), *use_commands(run)) if line]
    lines += [shlex.join(evaluation.record["command"]) for evaluation in evaluations if "command" in evaluation.record]
    return "<h2>To repeat it</h2>" + "".join(f"<pre>{escape(line)}</pre>" for line in dict.fromkeys(lines))
