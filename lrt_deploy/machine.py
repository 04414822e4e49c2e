"""What the operating system says of the machine and of this process: the processor's name, the peak of memory.

No measurements and no libraries: those are `benchmark`, `bandwidth` and `doctor`.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

_CPU_FACTS = Path("/proc/cpuinfo")


def cpu_model() -> str:
    """As the system names it."""
    if _CPU_FACTS.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_FACTS.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not count it so."""
    if os.name != "posix":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
