"""What a measurement needs beside its numbers: the command, the machine's kind, the versions."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    packages = ("torch", "numpy", "scikit-learn", "faiss-cpu")
    import torch

    return {
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
    }


def write_result(name: str, numbers: dict[str, Any]) -> Path:
    """Print a result and keep it as JSON with the command that made it."""
    arguments = " ".join(sys.argv[1:])
    command = f"python tests/benchmarks/{name}.py {arguments}".rstrip()
    result = {"command": command, **numbers, "environment": environment()}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return path
