"""Rivals as others install them, each in an environment of its own in the user's cache, for the scripts here.

Made on the first call (some minutes); used again after.
"""

import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipkit-bench"
REQUIREMENTS = {
    "open_clip": ["open_clip_torch[training]", "psutil"],
    # With autofaiss, which does not start alone: it asks for an old numpy and gets a pyarrow that wants a new one. Nor
    # does this one with transformers 5, nor does it build kinds with OPQ with FAISS 1.13 or later.
    "clip_retrieval": ["clip-retrieval", "transformers<4.50", "setuptools<81", "faiss-cpu<1.13"],
    # Its own code wants what numpy 2 has taken away.
    "clip_benchmark": ["clip_benchmark", "numpy<2", "transformers<5"],
    "hf_pipeline": ["transformers<5", "torch", "torchvision", "pillow"],
}


def environment(rival: str = "open_clip") -> Path:
    """The Python of a rival's environment, made if it is not there."""
    folder = CACHE / rival
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing {rival} into {folder}", file=sys.stderr)
        alone = {**os.environ, "PYTHONPATH": ""}
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], env=alone, check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[rival]], env=alone, check=True)
        (folder / "complete").touch()
    return python
