"A run that is killed, whenever, goes on and ends with the numbers of a run that was not"
import os, random, signal, subprocess, sys
import pytest
from conftest import MICRO, ROOT, reaches, result, script

SAME = ('steps', 'tokens', 'train_loss', 'val_bpb', 'val_loss', 'ledger')

def start(base, tag, step):
    "Start a run that takes its time from `step` on, and wait until it is there"
    env = {**os.environ, 'NANOCHAT_BASE_DIR': str(base), 'OMP_NUM_THREADS': '1'}
    p = subprocess.Popen([sys.executable, ROOT/'tests/slow_base_train.py', str(step), '1', *MICRO, '--tag', tag, '--save-every', '4'], env=env, cwd=ROOT,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert reaches(base/f'base/{tag}/metrics.jsonl', step, p), f'it ended with {p.poll()} before step {step}'
    return p

@pytest.fixture(scope='module')
def straight(micro):
    r = script('base_train', *MICRO, '--tag', 'straight', '--save-every', 4, base=micro)
    assert r.returncode == 0, r.stderr
    return {k: result(r)[k] for k in SAME}

@pytest.mark.parametrize('sig,code', [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=lambda x: str(x))
def test_killed_run_ends_equal(micro, straight, sig, code):
    tag = f'killed-{int(sig)}'
    p = start(micro, tag, random.Random(int(sig)).randrange(6, 20))
    p.send_signal(sig)
    assert p.wait(120) == code
    assert not (micro/f'base/{tag}/result.json').exists()
    r = script('base_train', *MICRO, '--tag', tag, '--save-every', 4, base=micro)
    assert r.returncode == 0, r.stderr
    assert {k: result(r)[k] for k in SAME} == straight

def test_two_processes_in_one_folder(micro):
    p = start(micro, 'twice', 2)
    try:
        p.send_signal(signal.SIGSTOP)                     # it sleeps, and holds the folder
        r = script('base_train', *MICRO, '--tag', 'twice', '--save-every', 4, base=micro)
    finally: p.kill(); p.wait()
    assert r.returncode == 1 and 'in use' in r.stderr, r.stderr
