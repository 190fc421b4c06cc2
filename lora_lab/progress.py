"""One progress line, in a notebook as a bar that stays readable when the notebook is stored."""

import html
import time

from IPython import get_ipython
from IPython.display import display
from tqdm import tqdm


class progress(tqdm):
    """tqdm whose notebook form is an HTML bar updated in place, with no widget state to store and nothing on stderr.

    `for batch in progress(batches, desc="fit"):` or `with progress(total=n, desc=...) as bar: bar.update()`.
    `unit` is what it counts; `bar.note` replaces the closing line. In a terminal it is tqdm as it is.
    """

    note = handle = None

    def __init__(self, *args, unit="step", **options):
        notebook = getattr(get_ipython(), "kernel", None) is not None
        super().__init__(*args, unit=unit, gui=notebook, **options)  # gui: tqdm prints nothing by itself
        if notebook and not self.disable:
            self.handle = display(_line(f"{self.desc or ''} …", 0), raw=True, display_id=True)

    def display(self, *args, **options):
        if self.handle is None:
            return super().display(*args, **options)
        now = self.format_dict
        left = f", {(self.total - self.n) / now['rate']:.0f} s left" if now["rate"] and self.total else ""
        total = f" of {self.total:,}" if self.total else ""
        self.handle.update(_line(f"{self.desc or ''}: {self.n:,}{total}{left}", self.n / (self.total or 1)), raw=True)

    def close(self):
        if self.handle is not None and not self.disable:
            done = f"{self.desc or ''}: {self.n:,} {self.unit}s, {time.time() - self.start_t:.1f} s"
            self.handle.update(_line(self.note or done, 1), raw=True)
        super().close()


def _line(text: str, part: float) -> dict:
    """The notebook tests cut what stands behind the sign, since it differs in each run."""
    bar = "" if part >= 1 else f'<progress value="{part:.3f}"></progress> '
    return {"text/plain": f"◷ {text}", "text/html": f"<small>◷ {bar}{html.escape(text)}</small>"}
