"""The course's figures: one style, a message as the title, alternative text that reaches the reader.

Every function draws and shows one figure and returns nothing. Series differ by marker and line style as well as by
colour, so that they can be told apart in grey and by colour-blind readers (colours: Okabe and Ito 2008).
"""

import base64
import html
import io
import textwrap

import matplotlib
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1))]
matplotlib.rcParams.update({  # for all figures of a notebook, those that it draws itself included
    "font.size": 10, "axes.titlesize": 11, "figure.titlesize": 12.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3,
    "legend.frameon": False, "lines.markersize": 5})


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 3.6), **options):
    """A figure in the course's style and its axes, as from plt.subplots, for a picture of your own: end with `show`."""
    fig = Figure(figsize=size, layout="constrained")
    return fig, fig.subplots(rows, columns, **options)


def show(fig: Figure, alt: str, title: str = "") -> None:
    """Display a figure. `alt` says in words what it shows, for readers who cannot see it. It is compared by
    the notebook tests, so it holds no number that comes out of training."""
    if not alt.strip():
        raise ValueError("a figure needs alternative text: say what it shows")
    if title:
        fig.suptitle(title)
    raw = io.BytesIO()
    fig.savefig(raw, format="png", dpi=130, facecolor="white")
    small, picture = io.BytesIO(), Image.open(raw).convert("RGB")
    if len(picture.getcolors(picture.width * picture.height)) < 5000:  # no heat map, whose colours are its content
        picture = picture.quantize(128, method=Image.Quantize.MAXCOVERAGE, kmeans=1)  # this halves the notebook
    picture.save(small, "PNG", optimize=True)
    data, width = base64.b64encode(small.getvalue()).decode(), round(fig.get_size_inches()[0] * 100)
    page = f'<img alt="{html.escape(alt)}" width="{width}" src="data:image/png;base64,{data}">'
    # JupyterLab passes alternative text on only as HTML; the PNG is for viewers that take none
    display({"text/plain": f"Figure: {alt}", "image/png": data, "text/html": page}, raw=True)


def curves(series: dict, *, title: str, alt: str = "", ax=None, marks: dict | None = None, size=(6.4, 3.6),
           xticks=None, yticks=None, **options) -> None:
    """Lines: {label: (x, y)} or {label: (x, y, low, high)} with a shaded band. `marks` {text: y} are level lines;
    `options` go to matplotlib's Axes.set (xlabel, ylim, xscale="log", ...). They get a figure of their own, or are
    drawn on `ax`, one of several that `figure` gave and `show` will show: `alt` is then for show."""
    fig, axes = figure(size=size) if ax is None else (None, ax)
    for k, (label, (x, y, *band)) in enumerate(series.items()):
        marker = MARKERS[k % len(MARKERS)] if len(x) <= 40 else None
        axes.plot(x, y, color=COLOURS[k % len(COLOURS)], marker=marker, linestyle=LINES[k % len(LINES)], label=label)
        if band:
            axes.fill_between(x, *band, color=COLOURS[k % len(COLOURS)], alpha=0.18, linewidth=0)
    for text, level in (marks or {}).items():
        axes.axhline(level, color="0.45", linewidth=1, linestyle=(0, (6, 3)))
        axes.annotate(textwrap.fill(text, 18), (1, level), (4, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", fontsize=8.5)  # outside, so that no line is under it
    axes.set(title=title, **options)
    for axis, ticks in ((axes.xaxis, xticks), (axes.yaxis, yticks)):
        if ticks is not None:  # these alone, as plain numbers on a log scale, too
            axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.set_ticks([], minor=True)
    if fig:
        if len(series) > 1:
            axes.legend(fontsize=9)
        show(fig, alt)


def bars(values: dict, *, title: str, alt: str, fmt="{:.1f}", size=(6.4, 3.2), **axes) -> None:
    """Groups of bars with their value above: {label: {group: value}}."""
    fig, ax = figure(size=size)
    rows, at = list(values.values()), np.arange(len(values))
    groups = list(rows[0])
    width = 0.8 / len(groups)
    for k, group in enumerate(groups):
        heights = [row[group] for row in rows]
        drawn = ax.bar(at + (k - (len(groups) - 1) / 2) * width, heights, width * 0.94, color=COLOURS[k], label=group,
                       hatch=["", "//", "..", "xx"][k % 4], edgecolor="white")
        ax.bar_label(drawn, [fmt.format(h).replace("-", "−") for h in heights], fontsize=8.5, padding=2)
    ax.set_xticks(at, list(values))
    ax.grid(False, axis="x")
    ax.set(title=title, **axes)
    ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, never over them
    show(fig, alt)


def images(pictures, captions=None, *, title: str, alt: str, columns: int = 8, scale: float = 1.0,
           signed: bool = False) -> None:
    """Grey pictures in rows: (n, h, w), (n, 1, h, w), or flat MNIST digits (n, 784). `signed`: blue, white, red."""
    pictures = [np.asarray(p, dtype=float) for p in pictures]
    pictures = [p.reshape(28, 28) if p.ndim == 1 else p.squeeze() for p in pictures]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    size = 1.05 * columns * scale, (1.05 + 0.22 * bool(captions)) * rows * scale + 0.35
    fig, axes = figure(rows, columns, size=size, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for k, (ax, picture) in enumerate(zip(axes.flat, pictures, strict=False)):
        top = np.abs(picture).max() or 1
        limits = dict(cmap="RdBu_r", vmin=-top, vmax=top) if signed else dict(cmap="gray")
        ax.imshow(picture, interpolation="nearest", **limits)
        if captions:
            ax.set_title(captions[k], fontsize=8.5, pad=2)
    show(fig, alt, title)


def heatmap(matrix, *, title: str, alt: str = "", ax=None, size=(5.0, 4.0), numbers: str | None = None, limits=None,
            xticks=None, yticks=None, **options) -> None:
    """A matrix as colours, in a figure of its own or on `ax`, as for `curves`. `numbers`: a format such as "{:.2f}"
    writes each entry into its cell. `limits`: the values at the ends of the colours."""
    fig, axes = figure(size=size) if ax is None else (None, ax)
    matrix = np.asarray(matrix, dtype=float)
    low, high = limits or (matrix.min(), matrix.max())
    drawn = axes.imshow(matrix, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set(title=title, **options)
    for axis, ticks in ((axes.xaxis, xticks), (axes.yaxis, yticks)):
        if ticks is not None:
            axis.set_ticks(range(len(ticks)), ticks)
    for (i, j), value in np.ndenumerate(matrix) if numbers else ():
        axes.text(j, i, numbers.format(value), ha="center", va="center", fontsize=8,
                  color="black" if value > low + 0.6 * (high - low) else "white")
    axes.figure.colorbar(drawn, ax=axes, shrink=0.85)
    if fig:
        show(fig, alt)


def plane(matrices: dict, *, title: str, alt: str, vectors: dict | None = None, limit: float = 2.6) -> None:
    """What 2 x 2 matrices do to the plane: {caption: W}. The grid, the unit circle and e1, e2 are carried along;
    `vectors` {caption: (k, 2)} draws arrows of your own instead of e1, e2."""
    side = min(2.7, 8 / len(matrices))  # inches; JupyterLab shrinks a picture that is wider than its column
    fig, axes = figure(1, len(matrices), size=(side * len(matrices), side + 0.4), squeeze=False)
    line = np.linspace(-2, 2, 9)
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])  # (2, 200)
    for ax, (caption, W) in zip(axes.flat, matrices.items(), strict=True):
        W = np.asarray(W, dtype=float)
        for t in line:
            for ends in (np.array([[t, t], [-2, 2]]), np.array([[-2, 2], [t, t]])):  # (2, 2): two points as columns
                ax.plot(*(W @ ends), color="0.78", linewidth=0.9, zorder=1)
        ax.plot(*(W @ circle), color=COLOURS[0], linewidth=2, zorder=2)
        arrows = (vectors or {}).get(caption, W.T)  # rows: where e1 and e2 go
        for k, (x, y) in enumerate(np.asarray(arrows)):
            ax.annotate("", (x, y), (0, 0), zorder=3, arrowprops=dict(arrowstyle="-|>", color=COLOURS[1 + 2 * (k % 3)],
                        linewidth=2, linestyle=["-", "--"][k % 2], shrinkA=0, shrinkB=0))
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        ax.set_title(caption, fontsize=9.5)
        ax.grid(False)
    show(fig, alt, title)


def table(header, rows) -> None:
    """Display a small table; every entry is turned into text by str, so format numbers first."""
    lines = [header, ["---:"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(str(entry).replace("|", r"\|") for entry in line) + " |" for line in lines)
    display({"text/plain": text, "text/markdown": text}, raw=True)
