"""Record docs/terminal.svg: three commands on the demo and what they print, as a picture of a terminal.

    .venv/bin/python docs/tools/terminal.py [FILE.svg]

The output is real and shortened by nothing but the tables on stderr, which are left out.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "lrt-deploy export demo/checkpoint my-bundle --max-seq-len 1024",
    "lrt-deploy parity my-bundle --checkpoint demo/checkpoint",
    'lrt-deploy generate my-bundle --prompt "Return the" --max-new-tokens 32',
)
# The template of rich loads a font from another host; the viewer's own is as good.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def record(console: Console, folder: Path) -> None:
    """Run the commands in a folder, and print them with their answers."""
    (folder / "demo").symlink_to(ROOT / "demo")
    for line in COMMANDS:
        verb, *words = shlex.split(line)
        command = [Path(sys.executable).parent / verb, *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        console.print(Text.assemble(("$ ", "green"), (line, "bold")))
        for text in done.stdout.strip("\n").splitlines():
            verdict = re.match(r"PASS\b", text)
            console.print(Text.assemble((text[:4], "bold green"), text[4:]) if verdict else Text(text))
        console.print()


def main() -> None:
    """Write the picture."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "terminal.svg"
    console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        record(console, Path(folder))
    svg = console.export_svg(title="lrt-deploy", code_format=FORMAT, unique_id="lrt")
    if re.search(r"url\(\s*[\"']?http", svg):
        raise SystemExit("the picture would load something from another host")
    target.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
