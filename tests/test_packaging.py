"""A wheel carries the library, the jobs and the recipes, and nothing leaks out of the package."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from clipkit.cli import jobs, recipes

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_works_by_itself(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in [*jobs().values(), *recipes().values()]:
        assert f"clipkit/{path.parent.name}/{path.name}" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"clipkit"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "\n".join(
        [
            "import sys",
            "sys.path.insert(0, sys.argv[1])",
            "from clipkit import cli",
            "print(cli.__file__)",
            "cli.main(['recipes'])",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "tiny" in done.stdout
