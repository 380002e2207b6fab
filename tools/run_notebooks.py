"""Execute notebooks with a real kernel, store their outputs, and clean their metadata.

  python tools/run_notebooks.py                        all of nbs/ and lessons/
  python tools/run_notebooks.py nbs/00_common.ipynb    these only

A notebook that fails is left as it was, and the exit code says so."""
import argparse, os, re, subprocess, sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
VIEW = 'application/vnd.jupyter.widget-view+json'
COLOUR = re.compile(r'\x1b\[[\d;]*m')
EMPTY_BAR = re.compile(r'\s*\S*.*\b0%\|')            # what a progress widget looks like without its kernel

def default_notebooks():
    "The numbered notebooks of the book and of the course, and the index"
    return [p for folder in ('nbs', 'lessons') for p in sorted((ROOT/folder).glob('*.ipynb')) if p.name[0] not in '_.']

def skipped(cell):
    "Whether nbval leaves this cell out; then it keeps the output it has"
    return cell.cell_type == 'code' and ('NBVAL_SKIP' in cell.source or 'nbval-skip' in cell.metadata.get('tags', []))

def not_evaluated(cell):
    "Whether the cell says `#| eval: false`, which nbdev-test obeys too"
    return cell.cell_type == 'code' and bool(re.match(r'(#\s*\|.*\n)*#\s*\|\s*eval:\s*false', cell.source))

def tidy(nb, keep_bars):
    "Drop what does not outlive the kernel: live widgets with their random ids, and bars that stand at 0% where nothing compares them"
    nb.metadata.pop('widgets', None)
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        bar = lambda o: VIEW in o.get('data', {}) and EMPTY_BAR.match(o.data.get('text/plain', ''))
        if not keep_bars or 'nbval-ignore-output' in cell.metadata.get('tags', []): cell.outputs = [o for o in cell.outputs if not bar(o)]
        for out in cell.outputs:
            if len(out.get('data', {})) > 1: out.data.pop(VIEW, None)     # the text/html or text/plain fallback stays

def execute(path, timeout):
    "Run one notebook in its own folder and write it back"
    nb = nbformat.read(path, 4)
    kept = [(c, c.source, c.outputs) for c in nb.cells if skipped(c) or not_evaluated(c)]
    for cell, _, _ in kept: cell.source = 'pass'
    client = NotebookClient(nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}})
    client.execute()
    for cell, source, outputs in kept: cell.source, cell.outputs = source, outputs
    tidy(nb, keep_bars=path.parent.name == 'lessons')                     # nbval compares the text of a bar
    nbformat.write(nb, path)
    subprocess.run([Path(sys.executable).with_name('nbdev-clean'), '--fname', path], cwd=ROOT, check=True)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('notebooks', nargs='*', type=Path)
    ap.add_argument('--timeout', type=int, default=900, help='seconds that one cell may take')
    args = ap.parse_args()
    paths = [p.resolve() for p in args.notebooks] or default_notebooks()
    missing = [str(p) for p in paths if not p.is_file()]
    if missing: sys.exit(f'error: not there: {", ".join(missing)}')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])   # kernels inherit it
    failed = 0
    for path in paths:
        start = time.perf_counter()
        try: execute(path, args.timeout); what = 'ok'
        except CellExecutionError as e: what = 'FAILED\n' + COLOUR.sub('', str(e)); failed += 1
        except Exception as e: what = f'FAILED: {type(e).__name__}: {e}'; failed += 1
        print(f'{path.name:32} {time.perf_counter() - start:6.1f} s  {what}', flush=True)
    return f'error: {failed} of {len(paths)} notebooks failed' if failed else 0

if __name__ == '__main__': sys.exit(main())
