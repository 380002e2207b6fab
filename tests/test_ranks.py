"Several processes make the run that one makes: the scripts under torchrun, over gloo, and back to one process"
import json, os, signal, subprocess, sys
import pytest
from conftest import MICRO, ROOT, reaches, result, script
from nanochat.record import read_metrics, series

RUN = [*MICRO, '--batch-tokens', '1152', '--eval-every', '20', '--save-every', '10', '--seed', '3', '--eval-tokens', '150']      # 18 rows: 1, 2 and 3 processes

def torchrun(n, name, *args, base, **kw):
    "Start a script on n processes; the finished process"
    env = {**os.environ, 'NANOCHAT_BASE_DIR': str(base), 'OMP_NUM_THREADS': '1', 'NANOCHAT_COMMAND': '1'}
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}', '-m', f'nanochat.scripts.{name}', *map(str, args)]
    return subprocess.run(start, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, **kw)

def losses(base, tag): return series(read_metrics(base/'base'/tag), 'loss')[1]

@pytest.fixture(scope='module')
def alone(micro):
    out = script('base_train', *RUN, '--tag', 'alone', base=micro)
    assert out.returncode == 0, out.stderr
    return result(out)

@pytest.mark.parametrize('n', [2, 3])
def test_processes_make_the_run_of_one(micro, alone, n):
    out = torchrun(n, 'base_train', *RUN, '--tag', f'ranks{n}', base=micro)
    assert out.returncode == 0, out.stderr
    many = result(out)
    assert out.stdout.count('depth of') <= 1 and out.stdout.count('{"stage"') == 1                       # one of them speaks
    assert many['processes'] == n and many['tokens'] == alone['tokens'] and many['ledger'] == alone['ledger']
    assert abs(many['val_bpb'] / alone['val_bpb'] - 1) < 2e-3
    a, b = losses(micro, 'alone'), losses(micro, f'ranks{n}')
    assert len(a) == len(b) and max(abs(x / y - 1) for x, y in zip(a[:5], b)) < 1e-4 and max(abs(x / y - 1) for x, y in zip(a, b)) < 2e-2

def test_a_run_goes_on_with_another_number_of_processes(micro, alone):
    "Two processes are stopped by SIGTERM, three go on and are stopped, one finishes"
    folder = micro/'base'/'elastic'
    for n, at in ((2, 12), (3, 24)):
        stop_after(n, at, folder, micro)
    out = script('base_train', *RUN, '--tag', 'elastic', base=micro)
    assert out.returncode == 0, out.stderr
    assert abs(result(out)['val_bpb'] / alone['val_bpb'] - 1) < 2e-3
    records = [json.loads(line) for line in (folder/'metrics.jsonl').read_text().splitlines()]
    steps = [r['step'] for r in records if 'loss' in r]
    assert steps == list(range(1, 41))                                                                   # every step once

def stop_after(n, step, folder, base):
    "Start n processes that take their time from `step` on, and send SIGTERM to torchrun once it is in the record"
    env = {**os.environ, 'NANOCHAT_BASE_DIR': str(base), 'OMP_NUM_THREADS': '1', 'NANOCHAT_COMMAND': '1'}
    p = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}', ROOT/'tests/slow_base_train.py', str(step), '1',
                          *RUN, '--tag', 'elastic'], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reached = reaches(folder/'metrics.jsonl', step, p)
    p.send_signal(signal.SIGTERM)
    out, _ = p.communicate(timeout=300)
    assert p.returncode != 0 and reached, out
    assert (folder/'checkpoints').is_dir(), out

def test_a_mistake_ends_all_processes_with_one_sentence(micro):
    out = torchrun(2, 'base_train', *MICRO, '--batch-tokens', '1088', '--tag', 'odd', base=micro)         # 17 rows
    assert out.returncode != 0 and 'cannot be divided among 2 processes: pass --batch-tokens 1152' in out.stderr
    assert 'nanochat/scaling.py' not in out.stderr                    # torchrun shows a traceback of its own; ours would name this file

def test_bits_per_byte_do_not_depend_on_the_number_of_processes(micro, alone):
    "On the tokens on which the run was measured at its end: ten times its --eval-tokens"
    args = ['--tag', 'alone', '--tokens', 1500, '--samples', 1, '--begin', 'The capital of']
    one, two = script('base_eval', *args, base=micro), torchrun(2, 'base_eval', *args, base=micro)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    one, two = result(one), result(two)
    assert abs(one['bpb'] / alone['val_bpb'] - 1) < 1e-6 and abs(two['bpb'] / one['bpb'] - 1) < 1e-6
    assert (one['tokens'], one['bytes']) == (two['tokens'], two['bytes']) and [s['begin'] for s in one['samples']] == ['The capital of', '']
