"""Take a picture of every page of the built site at 1280 and 400 pixels; exit code 1 if one overflows horizontally.

    make docs && .venv/bin/python docs/tools/screenshots.py [SITE] [PICTURES]

Drives Chromium: `chromium` in the path, or LRT_DEPLOY_CHROMIUM.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
WIDTHS = (1280, 400)
FLAGS = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def overflow(page: Page) -> int:
    """Return by how many pixels a page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def main() -> int:
    """Visit every page at every width."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").resolve()
    pictures = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "build" / "pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    pages = sorted(path for path in site.glob("*.html") if path.name != "404.html")
    chromium = os.environ.get("LRT_DEPLOY_CHROMIUM") or shutil.which("chromium")
    flags = FLAGS + (["--no-sandbox"] if os.geteuid() == 0 else [])  # Chromium's sandbox refuses root
    wide = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        for width in WIDTHS:
            window = browser.new_page(viewport={"width": width, "height": 900})
            for path in pages:
                window.goto(path.as_uri())
                window.screenshot(path=pictures / f"{path.stem}-{width}.png")
                if (pixels := overflow(window)) > 0:
                    wide.append(f"{path.name} at {width}: {pixels} pixels too wide")
        browser.close()
    sys.stdout.write("\n".join([*wide, f"{len(pages)} pages at {len(WIDTHS)} widths, {len(wide)} overflow", ""]))
    return 1 if wide or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
