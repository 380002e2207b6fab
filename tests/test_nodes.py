"""Several machines: torchrun's rendezvous with two agents on this one. They make the run of one process; when a worker or a machine dies
the other side ends by itself; with --max-restarts the run goes on from the newest checkpoint to the same result"""
import contextlib, json, os, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import MICRO, ROOT, result, script
from nanochat.record import read_metrics, series

RUN = [*MICRO, '--batch-tokens', '1152', '--eval-every', '20', '--save-every', '5', '--seed', '3']
TOGETHER = 200                                       # seconds that the agents may take, starting and restarting included
pytestmark = pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='looks for the workers of torchrun in /proc')

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

class Agent:
    "One torchrun of several, as it would run on its own machine"
    def __init__(self, port, tag, base, folder, first=False, restarts=0):         # the first one keeps the book of who is there
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder/'out', folder/'err'
        start = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc-per-node=1', '--rdzv-backend=c10d', f'--rdzv-id={tag}',
                 f'--rdzv-endpoint=127.0.0.1:{port}', f'--rdzv-conf=last_call_timeout=1,is_host={int(first)}', f'--max-restarts={restarts}', '--monitor-interval=0.1', '-m', '--',
                 'nanochat.scripts.base_train', *RUN, '--tag', tag]
        env = {**os.environ, 'NANOCHAT_BASE_DIR': str(base), 'OMP_NUM_THREADS': '1', 'NANOCHAT_COMMAND': '1',
               'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}                   # see runs/_stages.sh
        with open(self.out, 'wb') as out, open(self.err, 'wb') as err:
            self.process = subprocess.Popen(start, env=env, cwd=ROOT, stdout=out, stderr=err, start_new_session=True)

    def workers(self):
        "The processes that train, below this agent"
        children = Path(f'/proc/{self.process.pid}/task/{self.process.pid}/children')
        return [int(p) for p in children.read_text().split() if b'base_train' in Path(f'/proc/{p}/cmdline').read_bytes()]

    def end(self):
        "The exit code, once the agent has ended by itself"
        return self.process.wait(timeout=TOGETHER)

    def kill(self):
        "The machine loses its power. The agent's worker is in a session of its own, as torchrun starts it"
        if self.process.poll() is not None: return
        for pid in [*self.workers(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=10)

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
    for a in started: a.kill()

def reach(folder, step, agents):
    "Wait until `step` is in the record of a run"
    end = time.time() + TOGETHER
    while time.time() < end and all(a.process.poll() is None for a in agents):
        if (folder/'metrics.jsonl').exists() and f'"step": {step}' in (folder/'metrics.jsonl').read_text(): return
        time.sleep(.01)
    pytest.fail('\n'.join(a.said() for a in agents))

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
        for a in both: a.kill()
    assert sum(a.out.read_text().count('{"stage"') for a in both) == 1                       # one of them speaks
    return json.loads((micro/'base/two/result.json').read_text())

def test_two_machines_make_the_run_of_one_process(micro, alone, two):
    assert two['processes'] == 2 and two['tokens'] == alone['tokens'] and two['ledger'] == alone['ledger']
    assert abs(two['val_bpb'] / alone['val_bpb'] - 1) < 2e-3
    a, b = (series(read_metrics(micro/'base'/tag), 'loss')[1] for tag in ('alone', 'two'))
    assert len(a) == len(b) and max(abs(x / y - 1) for x, y in zip(a[:5], b)) < 1e-4

def test_a_killed_worker_ends_both_sides(micro, agents):
    both = agents('killed')
    reach(micro/'base/killed', 7, both)
    os.kill(both[1].workers()[0], signal.SIGKILL)
    assert all(a.end() != 0 for a in both)
    assert not (micro/'base/killed/result.json').exists()

@pytest.mark.slow
def test_after_a_killed_worker_restarts_go_on_to_the_same_result(micro, two, agents):
    both, folder = agents('again', restarts=2), micro/'base/again'
    reach(folder, 12, both)
    os.kill(both[1].workers()[0], signal.SIGKILL)
    assert [a.end() for a in both] == [0, 0], both[0].said() + both[1].said()
    again = json.loads((folder/'result.json').read_text())
    assert again['val_bpb'] == two['val_bpb'] and again['train_loss'] == two['train_loss'] and again['ledger'] == two['ledger']
    assert steps(folder) == list(range(1, 41))                                                # every step once

@pytest.mark.slow
def test_a_lost_machine_is_replaced(micro, two, agents):
    "The other agent waits for a new one, and both go on"
    both, folder = agents('lost', restarts=2), micro/'base/lost'
    reach(folder, 12, both)
    both[1].kill()
    new = agents('lost', n=1, restarts=2)
    assert both[0].end() == 0 and new[0].end() == 0, both[0].said() + new[0].said()
    assert json.loads((folder/'result.json').read_text())['val_bpb'] == two['val_bpb'] and steps(folder) == list(range(1, 41))

@pytest.mark.slow
def test_a_lost_machine_without_restarts_ends_the_other(micro, agents):
    both = agents('gone')
    reach(micro/'base/gone', 7, both)
    both[1].kill()
    assert both[0].end() != 0
