"Every notebook in nbs/ runs top to bottom (what `nbdev-test` does), one pytest item per notebook"
import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

def draft(path):
    "Whether nbdev skips it: a name or a folder that starts with _ or ."
    return any(part[0] in '_.' for part in path.relative_to(ROOT/'nbs').parts)

NBS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not draft(p))

@pytest.mark.parametrize('nb', NBS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_notebook(nb):
    cmd = [Path(sys.executable).with_name('nbdev-test'), nb]
    r = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, (r.stdout + r.stderr)[-6000:]
