"What several test files share: a micro data folder and tokenizer, and the run that runs/test.sh has made"
import json, os, subprocess, sys
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
