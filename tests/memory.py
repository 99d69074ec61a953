"""How much memory a piece of code takes at most, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MEASURED = Path("/proc/self/status").exists()
"""Peak memory is read where Linux shows it."""

CODE = """
import torch
import kxexplain as kx
def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
torch.set_num_threads(1)
{before}
begun = held()
{measured}
print(held() - begun)
"""


def peak(before: str, measured: str) -> float:
    """Megabytes that the second piece takes at most beyond what the first has left."""
    code = CODE.format(before=before, measured=measured)
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
