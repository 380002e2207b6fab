"""Several machines: torchrun's rendezvous with two agents on this one. They make the run of one process; when a worker or a machine dies
the other side ends by itself; with --max-restarts the run goes on from the newest checkpoint to the same result. A loss of node 0, which
keeps the book of who is there, ends the others; the same lines again go on"""
import contextlib, json, os, signal, subprocess, sys
from pathlib import Path
import pytest
from conftest import MICRO, ROOT, free_port, reaches, result, script
from nanochat.record import read_metrics, series

RUN = [*MICRO, '--batch-tokens', '1152', '--eval-every', '20', '--save-every', '5', '--seed', '3']
TOGETHER = 300                                       # seconds that the agents may take, starting and restarting included
SLOW = 'tests/slow_base_train.py'                    # from a step on it takes its time: a signal comes before the end however busy the machine is
pytestmark = pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='looks for the workers of torchrun in /proc')

def tree(pid):
    "A process and all below it; the workers of torchrun are in sessions of their own"
    below = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f'/proc/{pid}/task').iterdir():
            below += [p for child in (task/'children').read_text().split() for p in tree(int(child))]
    return [pid, *below]

def lose(machine):
    "It loses its power"
    if machine.process.poll() is not None: return
    for pid in tree(machine.process.pid):
        with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
    machine.process.wait(timeout=60)

class Agent:
    "One torchrun of several, as it would run on its own machine"
    def __init__(self, port, tag, base, folder, first=False, restarts=0, slow=None):     # the first one keeps the book; slow: from step, seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder/'out', folder/'err'
        start = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc-per-node=1', '--rdzv-backend=c10d', f'--rdzv-id={tag}',
                 f'--rdzv-endpoint=127.0.0.1:{port}', f'--rdzv-conf=last_call_timeout=1,read_timeout={TOGETHER},is_host={int(first)}', f'--max-restarts={restarts}',
                 '--monitor-interval=0.1',
                 *([SLOW, *map(str, slow)] if slow else ['-m', '--', 'nanochat.scripts.base_train']), *RUN, '--tag', tag]
        env = {**os.environ, 'NANOCHAT_BASE_DIR': str(base), 'OMP_NUM_THREADS': '1', 'NANOCHAT_COMMAND': '1',
               'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}                   # see runs/_stages.sh
        with open(self.out, 'wb') as out, open(self.err, 'wb') as err:
            self.process = subprocess.Popen(start, env=env, cwd=ROOT, stdout=out, stderr=err, start_new_session=True)

    def worker(self):
        "The process that trains, below this agent"
        return next(p for p in tree(self.process.pid)[1:] if b'base_train' in Path(f'/proc/{p}/cmdline').read_bytes())

    def end(self):
        "The exit code, once the agent has ended by itself"
        return self.process.wait(timeout=TOGETHER)

    def said(self): return self.err.read_text()[-4000:]

@pytest.fixture
def agents(micro, tmp_path):
    "A function that starts agents on one port; what is left of them at the end is killed"
    port, started = free_port(), []
    def start(tag, n=2, **kw):
        new = [Agent(port, tag, micro, tmp_path/f'agent{i}', first=not i, **kw) for i in range(len(started), len(started) + n)]
        started.extend(new)
        return new
    yield start
    for a in started: lose(a)

def reach(folder, step, agents):
    "Wait until `step` is in the record of a run"
    if not reaches(folder/'metrics.jsonl', step, *(a.process for a in agents)): pytest.fail('\n'.join(a.said() for a in agents))

def steps(folder): return [r['step'] for r in map(json.loads, (folder/'metrics.jsonl').read_text().splitlines()) if 'loss' in r]

@pytest.fixture(scope='module')
def alone(micro):
    out = script('base_train', *RUN, '--tag', 'alone', base=micro)
    assert out.returncode == 0, out.stderr
    return result(out)

@pytest.fixture(scope='module')
def two(micro, alone, tmp_path_factory):
    "The result of two agents that nobody disturbs"
    port, folder = free_port(), tmp_path_factory.mktemp('two')
    both = [Agent(port, 'two', micro, folder/str(i), first=not i) for i in range(2)]
    try: assert [a.end() for a in both] == [0, 0], both[0].said() + both[1].said()
    finally:
        for a in both: lose(a)
    assert sum(a.out.read_text().count('{"stage"') for a in both) == 1                       # one of them speaks
    return json.loads((micro/'base/two/result.json').read_text())

def test_two_machines_make_the_run_of_one_process(micro, alone, two):
    assert two['processes'] == 2 and two['tokens'] == alone['tokens'] and two['ledger'] == alone['ledger']
    assert abs(two['val_bpb'] / alone['val_bpb'] - 1) < 2e-3
    a, b = (series(read_metrics(micro/'base'/tag), 'loss')[1] for tag in ('alone', 'two'))
    assert len(a) == len(b) and max(abs(x / y - 1) for x, y in zip(a[:5], b)) < 1e-4

def test_a_killed_worker_ends_both_sides(micro, agents):
    both = agents('killed', slow=(7, 1))
    reach(micro/'base/killed', 7, both)
    os.kill(both[1].worker(), signal.SIGKILL)
    assert all(a.end() != 0 for a in both)
    assert not (micro/'base/killed/result.json').exists()

@pytest.mark.slow
def test_after_a_killed_worker_restarts_go_on_to_the_same_result(micro, two, agents):
    both, folder = agents('again', restarts=2, slow=(12, .2)), micro/'base/again'
    reach(folder, 12, both)
    os.kill(both[1].worker(), signal.SIGKILL)
    assert [a.end() for a in both] == [0, 0], both[0].said() + both[1].said()
    again = json.loads((folder/'result.json').read_text())
    assert again['val_bpb'] == two['val_bpb'] and again['train_loss'] == two['train_loss'] and again['ledger'] == two['ledger']
    assert steps(folder) == list(range(1, 41))                                                # every step once

@pytest.mark.slow
def test_a_lost_machine_is_replaced(micro, two, agents):
    "The other agent waits for a new one, and both go on"
    both, folder = agents('lost', restarts=2, slow=(12, .2)), micro/'base/lost'
    reach(folder, 12, both)
    lose(both[1])
    new = agents('lost', n=1, restarts=2, slow=(12, .2))
    assert both[0].end() == 0 and new[0].end() == 0, both[0].said() + new[0].said()
    assert json.loads((folder/'result.json').read_text())['val_bpb'] == two['val_bpb'] and steps(folder) == list(range(1, 41))

@pytest.mark.slow
def test_a_lost_machine_without_restarts_ends_the_other(micro, agents):
    both = agents('gone', slow=(7, 1))
    reach(micro/'base/gone', 7, both)
    lose(both[1])
    assert both[0].end() != 0

# ------------------------------------------------------------------------------------------------ as runs/_stages.sh starts them
NODE = """
source runs/_stages.sh
flags="nodes node head gpus tag restarts" tag="" gpus=1
options "$@"
source runs/_setup.sh ""
python="$PYTHON"
slowly() {
    local word words=()
    for word in "$@"; do
        if [ "$word" = nanochat.scripts.base_train ]; then words=("${words[@]:0:${#words[@]}-2}" $SLOW); else words+=("$word"); fi     # not -m --
    done
    "$python" "${words[@]}"
}
[ -z "$SLOW" ] || PYTHON=slowly
ranks "pretraining" base_train $FLAGS --tag "$tag"
"""

class Node:
    "One machine of two, as runs/speedrun.sh would start it there"
    def __init__(self, i, port, tag, base, folder, restarts=0, slow=''):
        self.err = folder/f'err{i}'
        args = ['--nodes', 2, '--node', i, '--head', f'127.0.0.1:{port}', '--tag', tag, '--restarts', restarts]
        env = {**os.environ, 'NANOCHAT_BASE_DIR': str(base), 'OMP_NUM_THREADS': '1', 'FLAGS': ' '.join(RUN), 'SLOW': slow}
        with open(self.err, 'wb') as err:
            self.process = subprocess.Popen(['bash', '-c', NODE, 'node', *map(str, args)], env=env, cwd=ROOT, stdout=subprocess.DEVNULL,
                                            stderr=err, start_new_session=True)

    def said(self): return self.err.read_text()[-4000:]

@pytest.fixture
def nodes(micro, tmp_path):
    "A function that starts both nodes, always with the same lines; what is left of them at the end is killed"
    port, started = free_port(), []
    def start(tag, **kw):
        both = [Node(i, port, tag, micro, tmp_path, **kw) for i in range(2)]
        started.extend(both)
        return both
    yield start
    for n in started: lose(n)

@pytest.mark.slow
@pytest.mark.parametrize('restarts', [0, 3])
def test_a_lost_node_0_ends_the_other_and_the_same_lines_go_on(restarts, micro, two, nodes):
    "Restarts cannot help: the book of who is there is lost with it"
    tag = f'headless{restarts}'
    both, folder = nodes(tag, restarts=restarts, slow=f'{SLOW} 12 1'), micro/'base'/tag
    reach(folder, 12, both)
    lose(both[0])
    assert both[1].process.wait(timeout=120) == 1, both[1].said()
    assert both[1].said().splitlines()[-1] == 'error: pretraining ended with exit code 1: see the lines above; the same command goes on from here'
    assert 12 <= steps(folder)[-1] < 40 and not (folder/'result.json').exists()
    again = nodes(tag, restarts=restarts)
    assert [n.process.wait(timeout=TOGETHER) for n in again] == [0, 0], again[0].said() + again[1].said()
    end = json.loads((folder/'result.json').read_text())
    assert end['val_bpb'] == two['val_bpb'] and end['train_loss'] == two['train_loss'] and end['ledger'] == two['ledger']
    assert steps(folder) == list(range(1, 41))                                                # every step once
