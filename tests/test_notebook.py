"""docs/first_steps.ipynb runs from top to bottom, as its reader would run it, and is committed without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


def test_it_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jupyter", "execute", "--timeout=300", NOTEBOOK.name],
        cwd=NOTEBOOK.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_it_has_no_outputs() -> None:
    """They differ by machine, and nobody would notice that they are out of date."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
