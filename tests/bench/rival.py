"""open_clip as others install it, in an environment of its own in the user's cache, for the scripts beside this one.

Made on the first call (some minutes), with what its `training` extra asks for; used again after.
"""

import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipkit-bench"
REQUIREMENTS = ["open_clip_torch[training]", "psutil"]


def environment() -> Path:
    """The Python of open_clip's environment, made if it is not there."""
    folder = CACHE / "open_clip"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing {REQUIREMENTS[0]} into {folder}", file=sys.stderr)
        alone = {**os.environ, "PYTHONPATH": ""}
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], env=alone, check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], env=alone, check=True)
        (folder / "complete").touch()
    return python
