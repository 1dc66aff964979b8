"""Where a record was made: versions, device, processor, commit."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from .workers import with_launcher


def command(prog: str) -> str:
    """What this process was started as, for the record; with the launcher, if it started several.

    Args:
        prog: the program's name, as its `--help` has it.
    """
    count = int(os.environ.get("WORLD_SIZE") or 1)
    return shlex.join(with_launcher([*prog.split(), *sys.argv[1:]], count))


def now() -> str:
    """The date and time, for the record."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def call_of(prog: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """This process's command, when and where it runs, for the record."""
    return {"command": command(prog), "date": now(), "environment": environment(device, dtype)}


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, device, number format and threads, for the record."""
    cuda = device.type == "cuda"
    return {
        "sparsed": _version(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "platform": platform.platform(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's name; Linux keeps it in a file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version() -> str | None:
    """The installed package's version, None in a checkout that is not installed."""
    try:
        return metadata.version("sparsed")
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file is in, -dirty if its files have changed since; None without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
