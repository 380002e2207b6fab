"What several test files share: a micro data folder and tokenizer, and the run that runs/test.sh has made"
import contextlib, json, os, random, socket, subprocess, sys, time
from pathlib import Path
import pytest
from hypothesis import settings

settings.register_profile('same every time', derandomize=True, deadline=None)      # a test that fails fails again
settings.load_profile('same every time')

ROOT = Path(__file__).resolve().parent.parent
MICRO = ['--depth', '1', '--max-len', '64', '--steps', '40', '--batch-tokens', '1024', '--data', 'micro', '--tokenizer', 'micro']

def script(name, *args, base, **kw):
    "Run `python -m nanochat.scripts.<name>` with its own base folder"
    env = {**os.environ, 'NANOCHAT_BASE_DIR': str(base), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-m', f'nanochat.scripts.{name}', *map(str, args)], env=env, cwd=ROOT, capture_output=True,
                          text=True, timeout=900, **kw)

def free_port():
    "Below 32768, where the system takes the ports of connections from: nobody gets it before its server does"
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(('', port))
            return port

def reaches(metrics, step, *processes, seconds=300):
    "Whether `step` comes into the record of a run while all its processes live; returns as soon as that is known"
    end = time.monotonic() + seconds
    while not (there := metrics.exists() and f'"step": {step},' in metrics.read_text()) and time.monotonic() < end and all(p.poll() is None for p in processes):
        time.sleep(.01)
    return there

def result(run): return json.loads(run.stdout.splitlines()[-1])

@pytest.fixture(scope='module')
def one_thread():
    "Small tensors: threads that wait for each other cost more than they give"
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def micro(tmp_path_factory):
    "A base folder with a little tiny-world data and a tokenizer of 512 tokens, both called micro"
    base = tmp_path_factory.mktemp('base')
    for r in (script('data', 'prepare', '--name', 'micro', '--docs', 1500, '--val-docs', 60, base=base),
              script('tok_train', '--data', 'micro', '--tag', 'micro', '--vocab-size', 512, base=base)):
        assert r.returncode == 0, r.stderr
    return base

@pytest.fixture(scope='session')
def small_run():
    "The base folder in which runs/test.sh has run `runs/tiny.sh --small`"
    base = Path(os.environ.get('NANOCHAT_BASE_DIR', '/nowhere'))
    if not (base/'report/small/result.json').exists():
        pytest.skip('no small run in NANOCHAT_BASE_DIR: runs/test.sh makes one, or run `bash runs/tiny.sh --small`')
    return base
