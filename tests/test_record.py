"The record of a run: crashes, two processes, full disks"
import errno, json, math, os, shutil, subprocess, sys, textwrap, threading, types, warnings
import pytest, torch
from nanochat.common import UserError
from nanochat import record
from nanochat.record import (PANELS, LivePlot, Run, finished, lock, palette, plot_loss, plot_run, read_metrics, read_result,
                             read_sessions, series, smoothed, trackers)

@pytest.fixture
def run(tmp_path):
    r = Run(tmp_path/'base/tiny', dict(depth=4, lr=0.1))
    for step in range(5): r.log(step, loss=5. - step)
    return r

def test_a_run_is_a_folder(run):
    assert sorted(p.name for p in run.folder.iterdir()) == ['config.json', 'metrics.jsonl', 'sessions.jsonl']
    assert series(read_metrics(run.folder), 'loss') == ([0, 1, 2, 3, 4], [5, 4, 3, 2, 1])
    assert read_result(run.folder) is None and read_metrics(run.folder/'nobody') == {}
    assert run.finish(dict(bpb=1.5)) == dict(bpb=1.5) == read_result(run.folder)

def test_columns_have_equal_length(run):
    run.log(4, val_bpb=1.5)
    m = read_metrics(run.folder)
    assert {len(v) for v in m.values()} == {6} and m['val_bpb'] == [None] * 5 + [1.5] and series(m, 'val_bpb') == ([4], [1.5])

def test_values_that_json_lacks(run):
    run.log(5, loss=torch.tensor(math.nan), a=math.inf, b=-math.inf, c=torch.tensor(3), d='text', e=None, f=True)
    def refuse(x): raise AssertionError(f'{x} is no JSON')
    for line in run.metrics_path.read_text().splitlines(): json.loads(line, parse_constant=refuse)
    m = read_metrics(run.folder)
    assert math.isnan(m['loss'][-1]) and (m['a'][-1], m['b'][-1], m['c'][-1], m['d'][-1], m['f'][-1]) == (math.inf, -math.inf, 3, 'text', True)

@pytest.mark.parametrize('cut', range(1, 27, 4))
def test_a_torn_last_line_is_tolerated_and_repaired(run, cut):
    text = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(text[:-cut])                       # a line is 25 bytes: also cut into the one before
    whole = text[:-cut].count(b'\n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(series(read_metrics(run.folder), 'loss')[0]) == whole
        again = Run(run.folder, run.config)
        again.log(9, loss=0.)
        assert series(read_metrics(run.folder), 'loss')[0] == [0, 1, 2, 3, 4][:whole] + [9]

def test_damage_in_the_middle_is_named(run):
    lines = run.metrics_path.read_text().splitlines()
    run.metrics_path.write_text('\n'.join([lines[0], 'rubbish', '[1]', '{"loss": 1}', lines[4]]) + '\n')
    with pytest.warns(UserWarning) as caught: assert series(read_metrics(run.folder), 'loss')[0] == [0, 4]
    assert [str(w.message).split(' line ')[1][0] for w in caught] == ['2', '3', '4']

def test_truncate_after(run):
    run.log(2, val=1.)
    run.truncate_after(2)
    assert read_metrics(run.folder)['step'] == [0, 1, 2, 2]
    run.truncate_after(-1)
    assert read_metrics(run.folder) == {} and list(run.folder.glob('.*')) == []
    run.log(0, loss=1.)
    assert read_metrics(run.folder)['step'] == [0]

def test_finished(run):
    asked = dict(depth=4, lr=0.1)
    assert finished(run.folder, asked) is None and finished(run.folder/'nobody', asked) is None
    run.finish(dict(bpb=1.))
    assert finished(run.folder, asked) == dict(bpb=1.)
    with pytest.raises(UserError) as e: finished(run.folder, dict(depth=6, lr=0.1, data='x'))
    assert all(s in str(e.value) for s in ('depth was 4, now 6', "data was not set, now 'x'", '--force', '--tag')) and 'lr' not in str(e.value)
    tuples = Run(run.folder, dict(betas=(0.8, 0.95), folder=run.folder)); tuples.finish({})
    assert finished(run.folder, dict(betas=(0.8, 0.95), folder=run.folder)) == {}     # tuples and paths compare as they are stored
    Run(run.folder, asked)
    assert finished(run.folder, asked) is None                                          # begun again: not finished

def test_damaged_files_are_named(run):
    run.finish(dict(bpb=1.))
    (run.folder/'result.json').write_text('{"bpb": 1')
    with pytest.raises(UserError, match='result.json'): read_result(run.folder)
    (run.folder/'result.json').write_text('{}'); (run.folder/'config.json').write_text('')
    with pytest.raises(UserError, match='config.json'): finished(run.folder, {})

def test_a_result_is_whole_or_absent(run, monkeypatch):
    def fail(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(UserError, match='result.json'): run.finish(dict(bpb=1.))
    assert read_result(run.folder) is None

def test_a_full_disk_costs_measurements_not_training(run, monkeypatch):
    def append(self, line): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        m.setattr(Run, '_append', append)
        for step in range(5, 9): run.log(step, loss=0.)
    assert len(caught) == 1 and 'metrics.jsonl' in str(caught[0].message)
    run.log(9, loss=0.)
    assert read_metrics(run.folder)['step'] == [0, 1, 2, 3, 4, 9]

def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='cannot open the run folder'): Run(tmp_path/'file/run', {})

HOLDER = '''
import sys
from nanochat.record import lock
with lock(sys.argv[1]):
    print('in', flush=True)
    sys.stdin.readline()
'''

@pytest.mark.skipif(os.name == 'nt', reason='flock')
def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    p = subprocess.Popen([sys.executable, '-c', HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'in\n'
        with pytest.raises(UserError, match=f'in use by process {p.pid} on'):
            with lock(tmp_path): pass
        p.kill(); p.wait()
        with lock(tmp_path): pass                                    # kill -9 left no trace
    finally: p.kill(); p.communicate()

def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            with lock(tmp_path/'new'): 1 / 0
    with lock(tmp_path/'new'), lock(tmp_path/'other'):
        with pytest.raises(UserError, match='use another --tag'):
            with lock(tmp_path/'new'): pass

def test_a_lock_outlives_its_folder(tmp_path):
    "`--force` deletes the folder while it holds the lock: others stay out"
    import shutil
    with lock(tmp_path/'run'):
        Run(tmp_path/'run', {}); shutil.rmtree(tmp_path/'run')
        with pytest.raises(UserError, match='in use'):
            with lock(tmp_path/'run'): pass

def test_import_draws_nothing():
    code = "import sys, nanochat.record; assert not {'matplotlib', 'IPython', 'ipywidgets', 'wandb', 'trackio', 'tensorboard'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)

def test_smoothed():
    assert smoothed([]) == [] and smoothed([2.] * 9) == pytest.approx([2.] * 9)
    assert math.isnan(smoothed([math.nan])[0]) and smoothed([math.nan, 4., math.inf])[1:] == pytest.approx([4., 4.])

def test_figures(run, monkeypatch):
    plt = pytest.importorskip('matplotlib.pyplot')
    plt.switch_backend('agg')
    assert len(set(palette.values())) == len(palette) == 8
    run.log(5, loss=math.inf, val_loss=2.)
    ax = plot_loss(None, read_metrics(run.folder), {'ln V': 5.5}, title='It falls')
    assert ax.get_title() == 'It falls' and [t.get_text() for t in ax.texts] == ['ln V'] and ax.get_legend_handles_labels()[1] == ['loss', 'val_loss']
    ax.figure.canvas.draw()
    assert plot_loss(ax, {}) is ax
    assert LivePlot(run.folder).update(force=True) is False           # not in a kernel: nothing
    plt.close('all')

def test_live_plot_updates_one_display(run, monkeypatch):
    pytest.importorskip('matplotlib'); IPython = pytest.importorskip('IPython.display')
    shown = []
    class Handle:
        def update(self, fig): shown.append('updated')
    monkeypatch.setattr(IPython, 'display', lambda fig, display_id: shown.append('new') or Handle())
    monkeypatch.setattr('nanochat.record._in_kernel', lambda: True)
    live = LivePlot(run.folder, {'ln V': 5.5}, every=1000)
    assert [live.update(), live.update(), live.update(force=True)] == [True, False, True] and shown == ['new', 'updated']
    assert LivePlot(run.folder, show=False).update(force=True) is False

# --- who wrote it

def test_each_session_is_recorded(run):
    from nanochat.common import _git_commit, environment
    Run(run.folder, run.config)
    first, second = read_sessions(run.folder)
    assert first['environment'] == second['environment'] == environment() and first['environment']['commit'] == _git_commit()
    assert first['processes'] == 1 and first['time'] <= second['time']
    with open(run.folder/'sessions.jsonl', 'a') as f: f.write('{"time": "20')           # torn
    assert len(read_sessions(run.folder)) == 2
    Run(run.folder, run.config)
    assert len(read_sessions(run.folder)) == 3
    (run.folder/'sessions.jsonl').write_text('rubbish\n')
    with pytest.raises(UserError, match='sessions.jsonl is damaged'): read_sessions(run.folder)

def test_a_clock_that_goes_backwards_is_recorded_and_no_more(run, monkeypatch):
    class Yesterday(record.datetime):
        @classmethod
        def now(cls, tz=None): return cls(1999, 12, 31, tzinfo=tz)
    monkeypatch.setattr(record, 'datetime', Yesterday)
    Run(run.folder, run.config).log(9, loss=1.)
    assert read_sessions(run.folder)[1]['time'].startswith('1999') and read_metrics(run.folder)['step'][-1] == 9

def test_the_id_of_a_run_stays_until_its_folder_goes(run):
    before = record._run_id(run.folder)
    Run(run.folder, dict(other=1))
    assert record._run_id(run.folder) == before
    other = Run(run.folder.parent/'other', run.config)
    assert record._run_id(other.folder) != before
    shutil.rmtree(run.folder)
    Run(run.folder, run.config)
    assert record._run_id(run.folder) != before

# --- trackers

class Fake(types.SimpleNamespace):
    "What our three trackers call, written down; `fail` raises or hangs in the call of that name"
    def __init__(self, fail='', how=None):
        super().__init__(calls=[], fail=fail, how=how, summary={})
        self.wandb = types.SimpleNamespace(init=self.init, Settings=dict, login=lambda prompt: True, api=None,
                                           setup=lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode='online')))
        self.trackio = types.SimpleNamespace(init=self.init)
        self.tensorboard = types.SimpleNamespace(SummaryWriter=self.init)
    def note(self, name, *a):
        if name == self.fail: self.how()
        self.calls.append((name, *a))
    def init(self, *a, **kw): self.note('init'); return self
    def define_metric(self, *a, **kw): pass
    def add_text(self, *a): pass
    def log(self, metrics, step=None): self.note('log', step if step is not None else metrics['step'], metrics['loss'])
    def add_scalar(self, name, value, step): self.note('log', step, value)
    def finish(self, exit_code=0): self.note('finish')
    close = finish
    def use(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard' if name == 'tensorboard' else name, getattr(self, name))

def follow(folder, name, n=4, seconds=60.):
    "Record `n` steps with a tracker; what was warned about"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run = Run(folder, dict(lr=.1), name)
        for step in range(n): run.log(step, loss=torch.tensor(float(step)), note='text')
        write = run.trackers.finish
        run.trackers.finish = lambda result: write(result, seconds)
        assert run.finish(dict(bpb=1.)) == dict(bpb=1.) == read_result(folder)
    assert series(read_metrics(folder), 'loss')[1] == [float(i) for i in range(n)]      # the record has all, whatever the tracker did
    return [str(w.message) for w in caught]

@pytest.mark.parametrize('name', ['wandb', 'trackio', 'tensorboard'])
def test_a_tracker_gets_everything(tmp_path, monkeypatch, name):
    fake = Fake(); fake.use(monkeypatch, name)
    assert follow(tmp_path/'base/tiny', name) == []
    assert fake.calls == [('init',), *(('log', i, float(i)) for i in range(4)), ('finish',)]
    assert fake.summary == (dict(bpb=1.) if name == 'wandb' else {})

class Odd:
    "Asked for its number, it raises"
    def item(self): raise KeyError('none')

def test_what_is_no_number_is_not_handed_over_and_stops_nothing(tmp_path, monkeypatch):
    fake = Fake(); fake.use(monkeypatch, 'trackio')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        t = trackers('trackio', tmp_path/'run', {})
        t.log(0, dict(loss=torch.tensor([2.]), weights=torch.ones(3), nothing=torch.ones(0), odd=Odd(), huge=10**400, text='3', none=None, nested=dict(a=1)))
        t.log(1, dict(loss=1))
        t.finish({}, 60)
    assert fake.calls == [('init',), ('log', 0, 2.), ('log', 1, 1.), ('finish',)]

def test_a_value_that_cannot_be_recorded_reaches_nobody_by_halves(tmp_path, monkeypatch):
    fake = Fake(); fake.use(monkeypatch, 'trackio')
    run = Run(tmp_path/'run', {}, 'trackio')
    run.log(0, loss=1., text='recorded, not tracked', huge=10**400)
    for bad in (object(), torch.ones(2), {1}):
        with pytest.raises((TypeError, RuntimeError)): run.log(1, loss=2., bad=bad)
    run.finish({})
    assert read_metrics(run.folder) == dict(step=[0], loss=[1.], text=['recorded, not tracked'], huge=[10**400])
    assert fake.calls == [('init',), ('log', 0, 1.), ('finish',)]

def crash(): raise RuntimeError('the network is gone')
def leave(): raise SystemExit(3)
def hang(): threading.Event().wait()

@pytest.mark.parametrize('name', ['wandb', 'trackio', 'tensorboard'])
@pytest.mark.parametrize('fail', ['init', 'log', 'finish'])
@pytest.mark.parametrize('how, says', [(crash, 'the network is gone'), (leave, '3'), (hang, 'did not finish')], ids=['crash', 'exit', 'hang'])
def test_no_failure_of_a_tracker_stops_the_run(tmp_path, monkeypatch, name, fail, how, says):
    Fake(fail, how).use(monkeypatch, name)
    said = follow(tmp_path/'base/tiny', name, seconds=.1 if how is hang else 60.)
    assert len(said) == 1 and says in said[0] and f'tracker {name} failed' in said[0] and 'metrics.jsonl has everything' in said[0]

def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    said = follow(tmp_path/'run', 'wandb')
    assert len(said) == 1 and 'pip install wandb' in said[0]

def test_wandb_never_asks_a_question(tmp_path, monkeypatch):
    fake = Fake(); fake.wandb.login = lambda prompt: False
    fake.use(monkeypatch, 'wandb')
    said = follow(tmp_path/'run', 'wandb')
    assert len(said) == 1 and 'WANDB_MODE=offline' in said[0] and fake.calls == []

def test_one_that_hangs_does_not_fill_the_memory_or_delay_the_others(tmp_path, monkeypatch):
    fine, done = Fake(), threading.Event(); fine.use(monkeypatch, 'trackio')
    fine.finish = lambda: (fine.note('finish'), done.set())
    def until_the_other_is_done():                                                       # were the other one delayed, it would be for ever
        done.wait()
        raise RuntimeError
    Fake('log', until_the_other_is_done).use(monkeypatch, 'wandb')
    real, sizes = record.queue.Queue, iter((20, 10_000))
    monkeypatch.setattr(record.queue, 'Queue', lambda n: real(next(sizes)))
    said = follow(tmp_path/'run', 'wandb,trackio', n=100)
    assert len(said) == 1 and 'wandb failed: it does not keep up' in said[0] and len(fine.calls) == 102

def test_a_wrong_name_touches_nothing(run):
    run.finish(dict(bpb=1.))
    with pytest.raises(UserError, match='--track wanbd is none of wandb, trackio, tensorboard'): Run(run.folder, dict(depth=5), 'wanbd')
    assert read_result(run.folder) == dict(bpb=1.) and len(read_sessions(run.folder)) == 1

def test_other_processes_do_not_track(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1'); monkeypatch.setenv('WORLD_SIZE', '2')
    run = Run(tmp_path/'run', {}, 'wandb')
    run.log(1, loss=1.); run.finish({})
    assert run.trackers.followers == [] and not (tmp_path/'run').exists()
    with pytest.raises(UserError, match='none of'): Run(tmp_path/'run', {}, 'nobody')     # all processes say so

def test_nothing_measured_starts_nothing(tmp_path, monkeypatch):
    fake = Fake(); fake.use(monkeypatch, 'trackio')
    t = trackers('trackio', tmp_path, {})
    t.finish({}); t.finish({})                                                             # twice does no harm
    assert fake.calls == []

def test_an_interrupted_program_hands_over_what_it_has(tmp_path):
    code = textwrap.dedent("""
        import sys
        from nanochat.record import TRACKERS, trackers
        def tracker(folder, config, step):
            out = open(folder/'seen', 'w')
            return lambda step, m: out.write(f'{step} '), lambda result: (out.write(f'end {result}'), out.close())
        TRACKERS['toy'] = tracker
        from pathlib import Path
        t = trackers('toy', Path(sys.argv[1]), {})
        for i in range(50): t.log(i, dict(loss=1.))
        raise SystemExit(143)""")
    assert subprocess.run([sys.executable, '-c', code, tmp_path]).returncode == 143
    assert (tmp_path/'seen').read_text() == ' '.join(map(str, range(50))) + ' end None'

def test_the_real_tensorboard(tmp_path):
    "A run that is interrupted after step 5 and goes on at step 3: each step once"
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    for steps in (range(6), range(3, 8)):
        t = trackers('tensorboard', tmp_path/'run', dict(lr=.1))
        for step in steps: t.log(step, dict(loss=float(step)))
        t.finish({})
    got = events.EventAccumulator(str(tmp_path/'run/tensorboard')).Reload().Scalars('loss')
    assert [(e.step, e.value) for e in got] == [(i, float(i)) for i in range(8)]

def test_the_real_trackio(tmp_path, monkeypatch):
    pytest.importorskip('trackio')
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path/'trackio'))
    assert follow(tmp_path/'base/tiny', 'trackio', seconds=60) == []

# --- pictures

def test_a_sheet_of_a_run(run):
    plt = pytest.importorskip('matplotlib.pyplot'); plt.switch_backend('agg')
    for step in range(5, 9): run.log(step, loss=math.nan, grad_norm=2., lr=.5, tokens_per_s=100., val_loss=2.)
    run.finish(dict(marks={'ln V': 5.5}))
    fig = plot_run(run.folder, beside=read_metrics(run.folder), title='A finding')
    fig.canvas.draw()
    assert [ax.get_ylabel() for ax in fig.axes] == list(PANELS.values()) and [t.get_text() for t in fig.axes[0].texts] == ['ln V']
    assert fig.axes[0].get_legend_handles_labels()[1] == ['another run', 'loss', 'val_loss']
    plot_run({}).canvas.draw()
    plt.close('all')

def test_live_plot_in_a_real_kernel(tmp_path):
    "A cell trains a toy: one output, changed in place, and at the end it shows the whole record"
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient'); pytest.importorskip('matplotlib'); pytest.importorskip('ipykernel')
    train = f"""
        import torch
        from nanochat.record import LivePlot, Run, plot_loss, read_metrics
        run, live = Run({str(tmp_path/'toy')!r}, {{}}), LivePlot({str(tmp_path/'toy')!r}, {{'floor': 0.}}, every=0)
        w = torch.zeros(3, requires_grad=True); opt = torch.optim.SGD([w], .1)
        for step in range(4):
            loss = (w - 1).square().sum(); opt.zero_grad(); loss.backward(); opt.step()
            run.log(step, loss=loss)
            assert live.update()"""
    show = f"""
        import matplotlib.pyplot as plt
        ax = plot_loss(None, read_metrics({str(tmp_path/'toy')!r}), {{'floor': 0.}}); plt.close(ax.figure)
        display(ax.figure)"""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(s)) for s in (train, show)])
    class Client(nbclient.NotebookClient):
        kinds = []
        def process_message(self, msg, cell, index):
            self.kinds.append(msg['msg_type'])
            return super().process_message(msg, cell, index)
    Client(nb, timeout=300, startup_timeout=300, kernel_name='python3').execute()
    live, last = (c.outputs for c in nb.cells)
    assert Client.kinds.count('update_display_data') == 3 and len(live) == 1
    assert live[0].data['image/png'] == last[0].data['image/png']

# --- what a real run records

@pytest.fixture(scope='module')
def small_world(tmp_path_factory):
    "Data and a tokenizer for `base_train`, both called toy"
    from nanochat.scripts.data import prepare
    from nanochat.scripts.tok_train import tok_train
    base = tmp_path_factory.mktemp('base')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_BASE_DIR', str(base))
        prepare('tinyworld', name='toy', docs=150, val_docs=10)
        tok_train(data='toy', tag='toy', vocab_size=300)
    return base

def toy_run(tag, **kw):
    from nanochat.scripts.base_train import base_train
    return base_train(depth=1, data='toy', tokenizer='toy', tag=tag, max_len=32, steps=6, batch_tokens=128, eval_tokens=200, save_every=2, device='cpu', **kw)

def test_a_run_records_its_dial_its_data_and_its_code(small_world, monkeypatch):
    "Also the commit of each session: an edited checkout is `-dirty`, and going on with another commit is recorded, not refused"
    from nanochat.common import environment, sha256_file
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(small_world))
    commits = iter(('0123456789ab', '0123456789ab-dirty', '0123456789ab-dirty'))
    monkeypatch.setattr(record, 'environment', lambda: {**environment(), 'commit': next(commits)})
    monkeypatch.setattr('nanochat.train.check_alive', lambda *a: None)
    def stop(step, metrics):
        if step == 5: raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): toy_run('told', on_step=stop)
    folder = small_world/'base/told'
    assert read_result(folder) is None and [s['environment']['commit'] for s in read_sessions(folder)] == ['0123456789ab']     # a run that crashed has it too
    result = toy_run('told')
    config = json.loads((folder/'config.json').read_text())
    assert config['recipe']['depth'] == 1 and config['recipe']['steps'] == 6 and config['recipe']['matrix_lr'] > 0 and config['seed'] == 0
    assert config['data_sha256'] == sha256_file(small_world/'data/toy/manifest.json') and len(config['tokenizer']) == 64
    assert [s['environment']['commit'] for s in read_sessions(folder)] == ['0123456789ab', '0123456789ab-dirty']
    assert result['environment'] == environment() and {'python', 'torch', 'cpus', 'device_name'} <= result['environment'].keys()
    m = read_metrics(folder)
    assert series(m, 'loss')[0] == [1, 2, 3, 4, 5, 6] and {'lr', 'grad_norm', 'tokens', 'seconds', 'tokens_per_s', 'data_seconds', 'val_bpb'} <= m.keys()
    assert all(0 <= wait <= 60 for wait in series(m, 'data_seconds')[1])

def test_a_tracker_follows_base_train(small_world, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(small_world))
    fake = Fake(); fake.use(monkeypatch, 'trackio'); fake.log = lambda metrics, step: fake.calls.append((step, *sorted(metrics)))
    toy_run('tracked', track='trackio')
    told = [c[0] for c in fake.calls]
    assert told[:7] == ['init', 1, 2, 3, 4, 5, 6] and told[-1] == 'finish' and set(told[7:-1]) == {6}
    assert 'grad_norm' in fake.calls[1] and any('val_bpb' in c for c in fake.calls)
    before = {p: p.read_bytes() for p in (small_world/'base/tracked').rglob('*') if p.is_file()}
    with pytest.raises(UserError, match='none of wandb, trackio, tensorboard'): toy_run('tracked', track='wanbd', force=True)
    assert before == {p: p.read_bytes() for p in (small_world/'base/tracked').rglob('*') if p.is_file()}
