"""Claims: sentences of the course, of the paper or of a tutorial, held against a measurement in the reader's sight."""

import html

from IPython.display import display

VERDICTS = {
    "confirmed": "✔ confirmed",
    "corrected": "✎ corrected",
    "not seen": "○ not seen at this scale",
    "open": "… open",
}


class ClaimBroken(AssertionError):
    """The measurement no longer supports the verdict."""


class _Claim:
    def __init__(self, statement, source, measured, verdict, correction):
        self.record = dict(statement=statement, source=source, measured=measured, verdict=verdict,
                           correction=correction)

    def rows(self):
        r = self.record
        said = "claim" if r["verdict"] == "confirmed" else "they say"
        yield said, f"{r['statement']} ({r['source']})"
        yield "measured", r["measured"]
        yield "verdict", VERDICTS[r["verdict"]] + (f": {r['correction']}" if r["correction"] else "")

    def __repr__(self):
        return "\n".join(f"{name:>8}: {text}" for name, text in self.rows())

    def _repr_html_(self):
        rows = "".join(f"<tr><th style='text-align:right;vertical-align:top'>{name}</th>"
                       f"<td style='text-align:left'>{html.escape(text)}</td></tr>" for name, text in self.rows())
        return f"<table class='lora-lab-claim'>{rows}</table>"


def claim(statement: str, *, source: str, measured: str, holds: bool, verdict: str = "confirmed",
          correction: str = "") -> None:
    """Show a claim with its source, what was measured and the verdict; raise ClaimBroken unless `holds`.

    `holds` is the evidence for the *verdict*, computed from this run's numbers with a margin: for "confirmed" that the
    statement is true, for "corrected" that the statement is wrong and `correction` is right, for "not seen" that the
    effect is absent here (`correction` says what is seen instead). "open": a later notebook will test it.
    Write ≈ before each number in `measured` that comes out of training: the notebook tests compare all the rest.
    The index of claims is made from what this shows.
    """
    if verdict not in VERDICTS:
        raise ValueError(f"verdict {verdict!r} is not one of {', '.join(VERDICTS)}")
    if (verdict == "confirmed") == bool(correction):
        raise ValueError("a corrected or unseen claim needs a correction, a confirmed one has none")
    shown = _Claim(statement, source, measured, verdict, correction)
    if not holds:
        raise ClaimBroken(f"no longer {verdict}: {statement} ({source}). Measured: {measured}")
    display(shown, metadata={"lora_lab_claim": shown.record})
