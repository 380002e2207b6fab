"What every pytest run of this repository needs: groups for its workers, threads, a folder of its own, and peace between nbdev and nbval"
import os, shutil, signal, tempfile, threading
import pytest


def pytest_configure(config):
    "A run folder of its own, so that no test touches the runs of the person who tests, and one core per worker"
    if threading.current_thread() is threading.main_thread():        # a shell starts background jobs with Ctrl-C ignored, and children inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if 'NANOCHAT_BASE_DIR' not in os.environ:
        config.nanochat_base = os.environ['NANOCHAT_BASE_DIR'] = tempfile.mkdtemp(prefix='nanochat-test-')     # workers inherit it
    workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
    if workers > 1: os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // workers)))

def pytest_unconfigure(config):
    made = getattr(config, 'nanochat_base', None)
    if made: shutil.rmtree(made, ignore_errors=True)

@pytest.hookimpl(optionalhook=True)      # pytest-xdist calls it, where that is installed
def pytest_xdist_make_scheduler(config, log):
    "One worker takes a file as a whole; the notebooks of nbs/ are apart from each other, though one file tests them"
    from xdist.scheduler import LoadScopeScheduling
    together = ('tests/test_small_run.py', 'lessons/00', 'lessons/03', 'lessons/04')      # each runs a stage of the small run again, under its lock
    class ByFile(LoadScopeScheduling):   # not --dist=loadgroup: with pytest 9.2, pytest-xdist 3.8 silently forgets the groups
        def _split_scope(self, nodeid):
            if nodeid.startswith(together): return 'the small run'
            return nodeid if 'test_nbs.py' in nodeid else nodeid.split('::')[0]
    return ByFile(config, log)

def pytest_itemcollected(item):
    "nbval reads `execution_count: null` as 'never run', and nbdev-clean writes exactly that: make the two agree"
    if type(item).__name__ == 'IPyNbCell' and item.cell.execution_count is None: item.cell.execution_count = 0
