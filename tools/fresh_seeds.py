"""Does what a notebook asserts hold with seeds that were not used to write it?

    python -m tools.fresh_seeds [NAME ...] [--sets N]      all notebooks that train, unless some are named

Runs each notebook N times, with the base model's seed and those that its cells name (seed=0, manual_seed(0), SEEDS =)
moved on by 20, 40, ...; a seed without its name, as in task(0), stays. A cell that fails is named with its error, and
the run goes on. It takes N times the notebook's seconds, and a new base model each.
"""

import argparse
import os
import re
import tempfile

from nbclient import NotebookClient

from tools.notebooks import FOLDER, paths, read

TRAIN = ("00", "03", "04", "05", "06", "07", "08")
NUMBER = re.compile(r"(\bseed=|manual_seed\()(\d+)(?=\s*[,)])")
SEVERAL = re.compile(r"(\bfor seed in |\bseed=|SEEDS\b.*? = )"
                     r"(list\(range\(.*?\)\)|range\(.*?\)|[(\[]\d+(?:, \d+)*[)\]])")


def moved(source: str, by: int) -> str:
    """A cell's code with every seed that it names greater by `by`."""
    source = source.replace("base_model()", "base_model(seed=0)")
    source = NUMBER.sub(lambda m: m[1] + str(int(m[2]) + by), source)
    return SEVERAL.sub(rf"\1[{by} + k for k in \2]", source)


def failures(nb, by: int) -> list[str]:
    """Run a notebook, in place, with its seeds moved; one line for each cell that fails."""
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = moved(cell.source, by)
    NotebookClient(nb, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}},
                   allow_errors=True).execute()
    return [f"{cell.id}: {output.ename}: {output.evalue}" for cell in nb.cells for output in cell.get("outputs", [])
            if output.output_type == "error"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=TRAIN, help="how the notebooks' names start")
    parser.add_argument("--sets", type=int, default=4, metavar="N", help="how often (default: 4)")
    args = parser.parse_args()
    for path in paths(tuple(args.names)):
        for by in range(20, 20 * args.sets + 1, 20):
            with tempfile.TemporaryDirectory() as empty:
                os.environ["LORA_LAB_CACHE"] = empty
                found = failures(read(path), by)
            print(f"{path.name}, seeds moved by {by}: cells that fail: {len(found)}", *found, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
