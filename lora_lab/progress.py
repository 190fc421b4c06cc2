"""One progress line, in a notebook as a bar that stays readable when the notebook is stored."""

import html
import time

from tqdm import tqdm

try:
    from IPython import get_ipython
    from IPython.display import display
except ImportError:  # the package also works without Jupyter
    def get_ipython():
        return None


class _Line:
    """Text and HTML of a bar. Everything after the sign is cut by the notebook tests, since it differs in each run."""

    def __init__(self, text: str, part: float):
        self.text, self.part = text, part

    def __repr__(self):
        return f"◷ {self.text}"

    def _repr_html_(self):
        bar = "" if self.part >= 1 else f'<progress value="{self.part:.3f}"></progress> '
        return f"<small>◷ {bar}{html.escape(self.text)}</small>"


class progress(tqdm):
    """tqdm whose notebook form is an HTML bar updated in place, with no widget state to store and nothing on stderr.

    `for batch in progress(batches, desc="fit"):` or `with progress(total=n, desc=...) as bar: bar.update()`.
    `unit` is what it counts, "step" if not given. In a terminal it is tqdm as it is.
    """

    def __init__(self, *args, unit="step", **options):
        self.in_notebook = getattr(get_ipython(), "kernel", None) is not None
        self.handle = None
        self.note = None  # replaces the closing line
        if self.in_notebook:
            options |= {"gui": True, "leave": True}  # gui: tqdm prints nothing by itself
        super().__init__(*args, unit=unit, **options)
        if self.in_notebook and not self.disable:
            self.handle = display(_Line(f"{self.desc or ''} …", 0), display_id=True)

    def display(self, *args, **options):
        if not self.in_notebook:
            return super().display(*args, **options)
        if self.handle is not None:
            done = self.format_dict
            known = done["rate"] and done["total"]
            left = f", {(done['total'] - done['n']) / done['rate']:.0f} s left" if known else ""
            total = f" of {done['total']:,}" if done["total"] else ""
            text = f"{self.desc or ''}: {done['n']:,}{total}{left}"
            self.handle.update(_Line(text, done["n"] / done["total"] if done["total"] else 0))

    def close(self):
        if self.handle is not None:
            seconds = time.time() - self.start_t
            self.handle.update(_Line(self.note or f"{self.desc or ''}: {self.n:,} {self.unit}s, {seconds:.1f} s", 1))
            self.handle = None
            self.disable = True
            with self.get_lock():
                self._instances.discard(self)
        else:
            super().close()
