"""Draws plots as inline SVG in the page's own colours, for its light and dark styles."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
from matplotlib.figure import Figure

from sam2_lora_ext.report.adapter_stats import Change

INK, GRID = "#010203", "#040506"  # placeholders for the page's own colours
COLOURS = ("#2f7ed8", "#e07b39", "#2ca25f", "#c23b6b", "#7b61c9", "#9a8a24")  # distinguishable on white and on black
STYLES = ("-", "--", ":")
Curve = tuple[Sequence[float], Sequence[float]]  # steps, values


def plot(curves: Mapping[tuple[str, str], Curve], title: str, ylabel: str, *, log: bool = False) -> str:
    """A plot of curves over optimizer steps as `<svg>`; an empty text without points.

    Args:
        curves: (run, quantity) -> curve; colours distinguish runs, or the curves of a single run.
        title: title above the plot.
        ylabel: label of the values.
        log: use a logarithmic axis if the values span more than a power of ten.
    """
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        return ""
    runs, kinds = (list(dict.fromkeys(names)) for names in zip(*curves))
    figure, axes = _axes((5.2, 3.0 if len(curves) < 4 else 3.3 + 0.1 * len(curves)))
    for (run, kind), (steps, values) in curves.items():
        colour, style = (runs.index(run), kinds.index(kind)) if len(runs) > 1 else (kinds.index(kind), 0)
        label = " ".join([*[run] * (len(runs) > 1), *[kind] * (len(kinds) > 1)]) or kind
        axes.plot(
            steps,
            values,
            label=_plain(label),
            color=COLOURS[colour % len(COLOURS)],
            linestyle=STYLES[style % len(STYLES)],
            marker="o" if len(steps) < 30 else None,
            markersize=3,
        )
    scale = "log" if log and _spans(curves) else "linear"
    axes.set(xlabel="optimizer step", ylabel=ylabel, title=_plain(title), yscale=scale)
    if len(curves) < 4:
        axes.legend(labelcolor=INK, frameon=False, fontsize=8)
    else:  # a large legend would hide the curves
        figure.legend(loc="outside lower center", ncols=2, labelcolor=INK, frameon=False, fontsize=8)
    return _svg(figure, title)


def bars(rows: Sequence[Change], title: str) -> str:
    """A horizontal bar for each row: `relative` in percent, or `norm` without the base."""
    if not rows:
        return ""
    relative = all(row.relative is not None for row in rows)
    figure, axes = _axes((6.2, 0.8 + 0.22 * len(rows)))
    values = [100 * row.relative if relative else row.norm for row in rows]
    axes.barh(range(len(rows)), values, color=COLOURS[0])
    xlabel = "norm of the update, % of the weight's" if relative else "norm of the update"
    axes.set(yticks=range(len(rows)), yticklabels=[row.name for row in rows], title=_plain(title), xlabel=xlabel)
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
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # text instead of paths; unique ids
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _plain(text: str) -> str:
    """Text escaped for matplotlib: a dollar would start a formula, a leading underscore would hide a legend entry."""
    return text.lstrip("_").replace("$", r"\$")


def _spans(curves: Mapping[tuple[str, str], Curve]) -> bool:
    values = [value for _, column in curves.values() for value in column]
    return min(values) > 0 and max(values) > 10 * min(values)
