"""A disk that is soon full, or read-only."""

import subprocess
from pathlib import Path


class SmallDisk:
    """A disk of `mib` MiB in memory at `folder`; `ok` is False where this user may not mount one."""

    def __init__(self, folder: Path, mib: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        options = f"size={int(mib * 2**20)}"
        self.ok = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
        ).returncode

    def read_only(self, on: bool) -> None:
        subprocess.run(["mount", "-o", f"remount,{'ro' if on else 'rw'}", self.folder], check=True)

    def close(self) -> None:
        if self.ok:
            subprocess.run(["umount", "-l", self.folder], check=True)
