"The record of a run: crashes, two processes, full disks"
import errno, json, math, os, subprocess, sys, warnings
import pytest, torch
from nanochat.common import UserError
from nanochat.record import LivePlot, Run, figure, finished, lock, palette, plot_loss, read_metrics, read_result, series, smoothed

@pytest.fixture
def run(tmp_path):
    r = Run(tmp_path/'base/tiny', dict(depth=4, lr=0.1))
    for step in range(5): r.log(step, loss=5. - step)
    return r

def test_a_run_is_a_folder(run):
    assert sorted(p.name for p in run.folder.iterdir()) == ['config.json', 'metrics.jsonl']
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
    with pytest.raises(UserError, match='cannot make the run folder'): Run(tmp_path/'file/run', {})

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
    code = "import sys, nanochat.record; assert not {'matplotlib', 'IPython', 'ipywidgets'} & set(sys.modules), sorted(sys.modules)"
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
