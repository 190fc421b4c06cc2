"""make bench: every table, printed; with --write also into benchmarks/README.md. Ratios within one run, no absolutes.

    python -m benchmarks [--write] [lora] [training] [notebooks]
"""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

from benchmarks import lora_speed, notebook_costs, training_speed

PARTS = {"lora": lora_speed, "training": training_speed, "notebooks": notebook_costs}
README = Path(__file__).parent / "README.md"


def machine() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "peft", "loralib"))
    return f"Python {platform.python_version()}, {versions}; {platform.machine()}, {os.cpu_count()} cores, no GPU."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/README.md")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    text = README.read_text(encoding="utf-8")
    for name in args.parts or PARTS:
        table = f"{machine()}\n\n{PARTS[name].run()}"
        print(f"\n## {name}\n\n{table}", flush=True)
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, rest = text.split(start)
        text = before + start + table + "\n" + end + rest.split(end, 1)[1]
    if args.write:
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
