"""Plots as inline SVG that follow the page's colours, so that they are right in light and dark."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from sam2_lora_ext.report.adapter_stats import Change

INK, GRID = "#010203", "#040506"  # stand for the page's own colours, which are put in afterwards
COLOURS = ("#2f7ed8", "#e07b39", "#2ca25f", "#c23b6b", "#7b61c9", "#9a8a24")  # to be told apart on white and on black
Curve = tuple[Sequence[float], Sequence[float]]  # steps, values


def plot(curves: Mapping[str, Curve], title: str, ylabel: str, *, log: bool = False) -> str:
    """Lines over optimizer steps as `<svg>`; empty without a point."""
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        return ""
    figure, axes = _axes((5.2, 3.0))
    for number, (name, (steps, values)) in enumerate(curves.items()):
        axes.plot(
            steps,
            values,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker="o" if len(steps) < 30 else None,
            markersize=3,
        )
    axes.set(
        xlabel="optimizer step", ylabel=ylabel, title=title, yscale="log" if log and _positive(curves) else "linear"
    )
    axes.legend(labelcolor=INK, frameon=False, fontsize=8)
    return _svg(figure, title)


def bars(rows: Sequence[Change], title: str) -> str:
    """A horizontal bar for each row: `relative` in percent, or `norm` where there is no base."""
    if not rows:
        return ""
    relative = all(row.relative is not None for row in rows)
    figure, axes = _axes((6.2, 0.8 + 0.22 * len(rows)))
    values = [100 * row.relative if relative else row.norm for row in rows]
    axes.barh(range(len(rows)), values, color=COLOURS[0])
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[row.name for row in rows],
        title=title,
        xlabel="norm of the update, % of the weight's" if relative else "norm of the update",
    )
    axes.invert_yaxis()
    axes.margins(y=0.01)
    return _svg(figure, title)


def _axes(size: tuple[float, float]):
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, which="both")
    for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
        part.set_color(INK)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title}
    ):  # text stays text; ids differ from plot to plot
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _positive(curves: Mapping[str, Curve]) -> bool:
    return all(value > 0 for _, values in curves.values() for value in values)
