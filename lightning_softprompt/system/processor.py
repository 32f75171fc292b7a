"""The processor of this machine."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """Returns the name of the processor: that of Linux, or Python's on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
