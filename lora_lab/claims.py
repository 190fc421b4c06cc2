"""Claims: sentences of the course, of the paper or of a tutorial, held against a measurement in the reader's sight."""

import html

from IPython.display import display

VERDICTS = {"confirmed": "✔ confirmed", "corrected": "✎ corrected", "not seen": "○ not seen at this scale",
            "open": "… open"}


def claim(statement: str, *, source: str, measured: str, holds: bool, verdict: str = "confirmed",
          correction: str = "") -> None:
    """Show a claim with its source, what was measured and the verdict; raise AssertionError unless `holds`.

    `holds` is the evidence for the *verdict*, computed from this run's numbers with a margin: for "confirmed" that the
    statement is true, for "corrected" that the statement is wrong and `correction` is right, for "not seen" that the
    effect is absent here (`correction` says what is seen instead). "open": a later notebook will test it.
    Write ≈ before each number in `measured` that comes out of training: the notebook tests compare all the rest.
    The index of claims is made from the metadata of what this shows.
    """
    if verdict not in VERDICTS:
        raise ValueError(f"verdict {verdict!r} is not one of {', '.join(VERDICTS)}")
    if (verdict == "confirmed") == bool(correction):
        raise ValueError("every verdict but confirmed needs a correction, and confirmed has none")
    if not holds:
        raise AssertionError(f"no longer {verdict}: {statement} ({source}). Measured: {measured}")
    rows = {"claim" if verdict == "confirmed" else "they say": f"{statement} ({source})", "measured": measured,
            "verdict": VERDICTS[verdict] + (f": {correction}" if correction else "")}
    text = "\n".join(f"{name:>8}: {said}" for name, said in rows.items())
    table = "".join(f"<tr><th style='text-align:right;vertical-align:top'>{name}</th>"
                    f"<td style='text-align:left'>{html.escape(said)}</td></tr>" for name, said in rows.items())
    record = dict(statement=statement, source=source, measured=measured, verdict=verdict, correction=correction)
    display({"text/plain": text, "text/html": f"<table class='lora-lab-claim'>{table}</table>"}, raw=True,
            metadata={"lora_lab_claim": record})
