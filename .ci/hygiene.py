"""Hygiene of the files named on the command line; exits 1 after mending or refusing any of them.

Text files end in one newline and carry no trailing whitespace (mended), notebooks carry no outputs
(mended), nothing is larger than 500 kB (refused; reference vectors are let through).
"""

import json
import re
import sys
from pathlib import Path

LIMIT = 500_000


def tidy(text: str) -> str:
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return text.rstrip("\n") + "\n" if text.strip() else ""


def strip_outputs(text: str) -> str:
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def check(path: Path) -> str | None:
    """Mends `path`; returns what was wrong with it, or None."""
    size = path.stat().st_size
    if size > LIMIT and "vectors" not in path.parts:
        return f"{size} bytes, over the limit of {LIMIT}"
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return None
    better = strip_outputs(text) if path.suffix == ".ipynb" else tidy(text)
    if better == text:
        return None
    path.write_text(better)
    return "mended"


def main(names: list[str]) -> int:
    found = [(name, check(Path(name))) for name in names if Path(name).is_file()]
    for name, what in found:
        if what:
            print(f"{name}: {what}")
    return int(any(what for _, what in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
