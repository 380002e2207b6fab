"""The faults that long runs meet, one after another; what other files test is named here, what none of them does is tested here

kill in a save, deaths between files, full disk, EIO, EDQUOT, damaged checkpoints, retention, kill in a purge: test_checkpoint.py
SIGKILL, SIGINT and SIGTERM of the script, two processes in one folder: test_interrupt.py    other numbers of processes: test_ranks.py
bad shards: test_dataset.py, test_tokens.py    downloads: test_download.py    a small disk: test_bad_input.py    trackers: test_record.py
loss spikes, stop, skip, rollback, a second Ctrl-C: nbs/34_train.ipynb
"""
import builtins, errno, json, math, os, random, shutil, subprocess, sys, textwrap, time, warnings, weakref
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
import nanochat.train as tr
from nanochat import tinyworld
from nanochat.checkpoint import checkpoints, load_model
from nanochat.common import UserError, read_json
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import documents, write_shards
from nanochat.gpt import GPT
from nanochat.optim import make_optimizer
from nanochat.record import TRACKERS, Run, finished, read_metrics, read_result, read_sessions, series
from nanochat.scaling import gpt_config, recipe
from nanochat.tokenizer import Tokenizer

TOK = Tokenizer({bytes([b]): b for b in range(256)})
R = recipe(1, TOK.n_vocab, 32, steps=12, batch_tokens=256, device_batch=4, head_dim=32)      # two micro-batches of four rows
pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')/'world'
    texts = [d.text for d in tinyworld.documents(120)]
    write_shards(folder, texts[20:], texts[:20], rows_per_group=32)
    return folder

def parts(data, seed=0):
    torch.manual_seed(seed)
    model = GPT(gpt_config(R))
    return model, make_optimizer(model, R), PretrainLoader(data, 'train', TOK, R.device_batch, R.max_len)

def go(data, folder, track=None, **kw):
    "Train for 12 steps: weights, losses, result"
    model, optimizer, loader = parts(data)
    run = Run(folder, {}, track)
    result = tr.train(model, optimizer, loader, R, run, ('t', 'h'), **kw)
    run.finish(result)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), series(read_metrics(folder), 'loss')[1], result

@pytest.fixture(scope='module')
def straight(data, tmp_path_factory): return go(data, tmp_path_factory.mktemp('run')/'straight')

def quiet(f, *a, **kw):
    "(result, warnings)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return f(*a, **kw), [str(w.message) for w in caught]

# --- many processes, real deaths: one child imports torch once and forks all others

WORLD = textwrap.dedent('''
    import hashlib, json, os, random, resource, shutil, signal, sys, tempfile, time, warnings
    from pathlib import Path
    import torch
    from torch.distributed import TCPStore
    torch.set_num_threads(1); warnings.simplefilter('ignore')
    import nanochat.checkpoint as ck, nanochat.record as record, nanochat.train as tr
    from nanochat.common import UserError, join_ranks, ranks
    from nanochat.dataloader import PretrainLoader
    from nanochat.gpt import GPT
    from nanochat.prefetch import prefetch
    from nanochat.record import Run, read_metrics
    from nanochat.scaling import gpt_config, recipe, share_of_rank
    from nanochat.sharded import make_sharded
    from nanochat.tokenizer import Tokenizer
    ck.environment = record.environment = lambda *a: {}                          # they ask git, in a process of its own
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    tok = Tokenizer({bytes([b]): b for b in range(256)})
    r = recipe(1, tok.n_vocab, 32, steps=12, batch_tokens=256, device_batch=2, head_dim=32)

    def digest(*tensors):
        h = hashlib.sha256()
        for t in tensors: h.update(t.detach().contiguous().numpy().tobytes())
        return h.hexdigest()

    def work(name, at=None, fault=None, save_every=3, ahead=False, pace=0.):
        "A run of this process; `fault` happens at (rank, step, micro-batch); each micro-batch takes `pace` seconds more"
        rank, _, world = ranks()
        real, calls = tr.lm_loss, [0]
        def lm_loss(model, inputs, targets, *a, **kw):
            step, micro = divmod(calls[0], 4 // world); calls[0] += 1
            time.sleep(pace)
            loss = real(model, inputs, targets, *a, **kw)
            if at != (rank, step, micro): return loss
            if fault == 'nan': return loss * float('nan')
            if fault == 'memory': raise torch.OutOfMemoryError('no room')
            os.kill(os.getpid(), signal.SIGKILL)
        tr.lm_loss = lm_loss
        with join_ranks('cpu'):
            torch.manual_seed(0)
            model = GPT(gpt_config(r))
            loader = PretrainLoader(data, 'train', tok, share_of_rank(r, world)[0], 32, rank=rank, world_size=world)
            if ahead: loader = prefetch(loader, torch.device('cpu'))
            optimizer, run = make_sharded(model, r), Run(out/name, {})
            stats = tr.train(model, optimizer, loader, r, run, ('t', 'h'), save_every=save_every)
            ids = torch.tensor([[65]])
            for _ in range(8): ids = torch.cat([ids, model.logits(model(ids))[:, -1:].argmax(-1)], 1)
            report = dict(weights=digest(*model.parameters()), optimizer=digest(*optimizer.tensors().values()), losses=read_metrics(out/name)['loss'],
                          batches=[digest(*next(loader)[:3]) for _ in range(8)], sample=ids.tolist(), skipped=stats['skipped'], tokens=stats['tokens'])
            (out/f'{name}-{rank}.json').write_text(json.dumps(report))

    def fork(f, *a, rank=0, world=1, port=0, **kw):
        pid = os.fork()
        if pid: return pid
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                          TORCHELASTIC_USE_AGENT_STORE='True', TORCHELASTIC_RESTART_COUNT='0')       # what torchrun says when the meeting place is its own
        if os.environ.get('SHOW') is None: os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try: f(*a, **kw); code = 0
        except UserError as e: (out/f'{a[0]}-says').write_text(str(e)); code = 3
        except BaseException as e: (out/f'{a[0]}-says').write_text(repr(e)); code = 4
        os._exit(code)

    def together(name, n=1, **kw):
        "Exit codes of n processes, and the seconds until the last one had ended"
        store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)     # it holds the port: nobody takes it before the processes do
        start = time.time()
        pids = [fork(work, name, rank=i, world=n, port=store.port, **kw) for i in range(n)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        return codes, time.time() - start

    work('warm')                                                                 # what torch prepares once, all children inherit
    exec((out/'plan.py').read_text())
''')

def world(data, out, plan, timeout=550):
    "Run a plan in the child; what it prints last"
    if not hasattr(os, 'fork'): pytest.skip('needs fork')
    out.mkdir(exist_ok=True)
    (out/'plan.py').write_text(textwrap.dedent(plan))
    p = subprocess.run([sys.executable, '-c', WORLD, data, out], env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''}, capture_output=True, text=True, timeout=timeout)
    assert p.returncode == 0, p.stderr[-3000:] + p.stdout[-1000:]
    return json.loads(p.stdout.splitlines()[-1])

def reports(out, name, n=1): return [json.loads((out/f'{name}-{i}.json').read_text()) for i in range(n)]

@pytest.fixture(scope='module')
def deaths(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('faults')/'runs'
    return out, world(data, out, '''
        report = dict(straight=together('straight')[0])
        for name, at in (('middle', (0, 7, 2)), ('first', (0, 2, 1))): report[name] = [together(name, at=at)[0], together(name)[0]]
        report['ahead'] = [together('ahead', at=(0, 7, 2), ahead=True)[0], together('ahead', ahead=True)[0]]
        def limited(name):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
            work(name)
        together('full', at=(0, 7, 2))
        report['full'] = [os.waitstatus_to_exitcode(os.waitpid(fork(limited, 'full'), 0)[1]), ck.latest(out/'full').name,
                          (out/'full/metrics.jsonl').read_text().count(chr(10)), together('full')[0]]

        together('two', 2)
        report['killed'] = together('killed', 2, at=(1, 7, 1)); report['again'] = together('killed', 2)
        for fault in ('nan', 'memory'): report[fault] = together(fault, 2, at=(1, 4, 1), fault=fault)

        def stranger(name, folder, say):
            os.setuid(65534)
            try: Run(folder, {})
            except UserError as e: os.write(say, str(e).encode())
        report['refused'] = []
        if os.geteuid() == 0:
            top = Path(tempfile.mkdtemp()); top.chmod(0o755); (top/'run').mkdir(mode=0o755)
            for folder in (top/'run', top/'new'):
                listen, say = os.pipe()
                os.waitpid(fork(stranger, 'stranger', folder, say), 0); os.close(say)
                report['refused'].append([str(folder), os.read(listen, 10_000).decode()]); os.close(listen)
            shutil.rmtree(top)
        print(json.dumps(report))''')

@pytest.mark.parametrize('name', ['middle', 'first', 'ahead'])
def test_killed_in_the_middle_of_a_step_it_ends_equal_to_the_bit(deaths, name):
    "Between the micro-batches of a step, before the first save, and with batches made ahead: weights, optimizer, losses, the next eight batches, what the model says"
    out, codes = deaths
    assert codes['straight'] == [0] and codes[name] == [[-9], [0]]
    assert reports(out, name) == reports(out, 'straight')

def test_a_disk_that_is_full_for_a_while(deaths):
    "Three saves fail, and the run ends in a sentence; the checkpoint of before is whole, and with room again all ends equal"
    out, codes = deaths
    code, path, lines, again = codes['full']
    assert (code, path, again) == (3, 'step-000006', [0]) and 6 <= lines < 12
    assert 'cannot save checkpoint' in (out/'full-says').read_text() and reports(out, 'full') == reports(out, 'straight')

def test_one_of_two_is_killed(deaths):
    "The other one ends by itself, soon, and not with 0; both started again end with what two that nobody disturbed end with"
    out, report = deaths
    (codes, seconds), again = report['killed'], report['again'][0]
    assert codes[1] == -9 and codes[0] not in (0, -9) and seconds < 200 and again == [0, 0]
    assert reports(out, 'killed', 2) == reports(out, 'two', 2)

def test_a_loss_that_is_no_number_on_one_of_two(deaths):
    "Caught before the update, on both; each writes the batch it had; the steps before are untouched"
    out, report = deaths
    assert report['nan'][0] == [0, 0]
    a, b = reports(out, 'nan', 2)
    assert a['weights'] == b['weights'] and a['skipped'] == b['skipped'] == 1 and a['losses'][4] == 'nan' or math.isnan(a['losses'][4])
    fine = reports(out, 'two', 2)[0]
    assert a['losses'][:4] == fine['losses'][:4] and all(math.isfinite(x) for x in a['losses'][5:]) and a['weights'] != fine['weights']
    kept = [read_json(out/f'nan/bad/step-000005-rank{i}.json') for i in (0, 1)]
    assert kept[0]['inputs'] != kept[1]['inputs'] and all(k['step'] == 5 and len(k['inputs']) == 2 for k in kept)

def test_no_memory_on_one_of_two(deaths):
    "Both cut their micro-batches; the step is the same step"
    out, report = deaths
    assert report['memory'][0] == [0, 0]
    (a, b), fine = reports(out, 'memory', 2), reports(out, 'two', 2)[0]
    assert a['weights'] == b['weights'] and a['skipped'] == 0 and a['tokens'] == fine['tokens']
    assert a['losses'] == pytest.approx(fine['losses'], abs=1e-3) and a['losses'][4] == pytest.approx(fine['losses'][4], abs=1e-5)

# --- one process

@pytest.mark.parametrize('room', [4, 3, 2, 1])
def test_micro_batches_shrink_until_they_fit(data, tmp_path, monkeypatch, room):
    "Gradients and counted tokens stay those of the whole step"
    def gradients(limit):
        model, optimizer, loader = parts(data)
        torch.nn.init.normal_(model.lm_head.weight, std=.2)                                # else most gradients are zero at the start
        seen, real = [], tr.lm_loss
        def lm_loss(model, inputs, *a, **kw):
            if len(inputs) > limit: raise torch.OutOfMemoryError('no room')
            return real(model, inputs, *a, **kw)
        optimizer.step = lambda: seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}) or True
        optimizer.grad_norm = 0.
        with monkeypatch.context() as m:
            m.setattr(tr, 'lm_loss', lm_loss)
            loop = tr.Loop(model, optimizer, loader, R, Run(tmp_path/str(limit), {}), ('t', 'h'))
            (metrics, said) = quiet(loop.one_step)
        return seen[0], metrics['tokens'], metrics['loss'], said
    whole, tokens, loss, _ = gradients(99)
    cut, tokens2, loss2, said = gradients(room)
    assert tokens == tokens2 == 256 and loss2 == pytest.approx(loss, abs=1e-5) and (len(said) > 0) == (room < 4)
    assert whole.keys() == cut.keys() and any(g.abs().max() > 1e-3 for g in whole.values())
    for n in whole: torch.testing.assert_close(whole[n], cut[n], atol=1e-6, rtol=1e-5)

def test_not_even_one_row_fits(data, tmp_path, monkeypatch):
    def lm_loss(*a, **kw): raise torch.OutOfMemoryError('no room')
    monkeypatch.setattr(tr, 'lm_loss', lm_loss)
    with pytest.raises(UserError, match='does not hold one row: lower --max-len or --depth'): quiet(go, data, tmp_path/'run')

def test_a_pass_that_did_not_fit_lets_go_of_its_activations(data, tmp_path, monkeypatch):
    "Before the processes talk about it, and before the cache of the GPU is emptied; and its message may be empty"
    alive, freed, real, sums = [], [], tr.lm_loss, tr.all_sum
    def lm_loss(model, inputs, *a, **kw):
        if len(inputs) > 2:
            activations = torch.ones(5)
            alive.append(weakref.ref(activations))
            raise torch.OutOfMemoryError('')
        return real(model, inputs, *a, **kw)
    def look(out):
        if alive: freed.append(alive[-1]() is None)
        return out
    monkeypatch.setattr(tr, 'lm_loss', lm_loss)
    monkeypatch.setattr(tr, 'all_sum', lambda *n: look(sums(*n)))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: look(False))
    model, optimizer, loader = parts(data)
    metrics, said = quiet(tr.Loop(model, optimizer, loader, R, Run(tmp_path/'run', {}), ('t', 'h')).one_step)
    assert len(said) == 1 and metrics['tokens'] == 256 and len(freed) > 2 and all(freed)

def test_no_memory_for_the_update_ends_the_run(data, tmp_path, monkeypatch):
    "Some weights may have moved: the step is not made again"
    model, optimizer, loader = parts(data)
    calls, real = [], optimizer.step
    def step():
        calls.append(1)
        if len(calls) == 5: raise torch.OutOfMemoryError('no room')
        return real()
    monkeypatch.setattr(optimizer, 'step', step)
    with pytest.raises(UserError, match='for the update of the weights: lower --depth'):
        tr.train(model, optimizer, loader, R, Run(tmp_path/'run', {}), ('t', 'h'), save_every=2)
    assert len(calls) == 5 and checkpoints(tmp_path/'run') == [2, 4]
    go(data, tmp_path/'run')                                                               # on from the last checkpoint

@pytest.mark.parametrize('seen', [None, {'step': 3}, {'odd': object()}, [1], {'many': torch.ones(3)}])
def test_a_look_that_cannot_be_recorded_is_a_warning(data, tmp_path, straight, seen):
    def hook(step): return seen
    (weights, losses, result), said = quiet(go, data, tmp_path/'run', hooks=((5, hook),))
    assert torch.equal(weights, straight[0]) and losses == straight[1] and result['steps'] == 12
    assert len([s for s in said if 'hook failed' in s]) == (0 if seen is None else 3) and read_result(tmp_path/'run')

def test_a_run_that_died_in_its_last_evaluation_is_judged_and_looked_at(data, tmp_path, straight):
    "The last save is there: nothing is left to train, and the rest is done as in a run that nobody disturbed"
    def die(step):
        if step == 12: raise RuntimeError('the lights go out')
        return dict(val_loss=1.)
    with pytest.raises(RuntimeError): go(data, tmp_path/'run', evaluate=die, eval_every=6, save_every=6)
    looks = []
    def hook(step): looks.append(step); return dict(looked=step)
    weights, _, result = go(data, tmp_path/'run', evaluate=lambda step: dict(val_loss=.5), hooks=((0, hook),))
    assert torch.equal(weights, straight[0]) and looks == [12] and (result['looked'], result['val_loss']) == (12, .5)
    scores = {p.parent.name: read_json(p)['score'] for p in (tmp_path/'run').glob('checkpoints/*/manifest.json')}
    assert scores == {'step-000006': 1., 'step-000012': .5}

@pytest.mark.parametrize('step', [1, 2, 7, 12])
def test_a_loss_that_is_no_number_changes_nothing(data, tmp_path, monkeypatch, step):
    real, calls, weights = tr.lm_loss, [0], []
    def lm_loss(*a, **kw):
        calls[0] += 1
        return real(*a, **kw) * (math.nan if calls[0] == 2 * step else 1)                  # in the second micro-batch
    monkeypatch.setattr(tr, 'lm_loss', lm_loss)
    model, optimizer, loader = parts(data)
    result = tr.train(model, optimizer, loader, R, Run(tmp_path/'run', {}), ('t', 'h'),
                      on_step=lambda *a: weights.append(torch.cat([p.detach().flatten() for p in model.parameters()])))
    before = weights[step - 2] if step > 1 else torch.cat([p.detach().flatten() for p in parts(data)[0].parameters()])
    assert torch.equal(weights[step - 1], before) and all(w.isfinite().all() for w in weights) and result['skipped'] == 1
    assert [p.name for p in (tmp_path/'run/bad').iterdir()] == [f'step-{step:06d}-rank0.json']

def test_a_bad_batch_that_cannot_be_written_does_not_end_the_run(data, tmp_path, monkeypatch):
    real, calls = tr.lm_loss, [0]
    def lm_loss(*a, **kw):
        calls[0] += 1
        return real(*a, **kw) * (math.nan if calls[0] == 10 else 1)
    monkeypatch.setattr(tr, 'lm_loss', lm_loss)
    def full(path, obj): raise UserError(f'cannot write {path}: the disk is full')
    monkeypatch.setattr(tr, 'write_json', full)
    (_, _, result), said = quiet(go, data, tmp_path/'run')
    assert result['steps'] == 12 and result['skipped'] == 1 and sum('the disk is full' in s for s in said) == 1

@pytest.mark.parametrize('clock', ['stands', 'backwards', 'jumps'])
def test_a_clock_that_is_wrong_changes_nothing_but_times(data, tmp_path, monkeypatch, straight, clock):
    tick = {'stands': lambda: 5., 'backwards': iter(range(10**6, 0, -1)).__next__, 'jumps': lambda: random.uniform(-1e9, 1e9)}[clock]
    monkeypatch.setattr(tr, 'time', SimpleNamespace(perf_counter=tick))
    monkeypatch.setattr(time, 'time', tick)
    weights, losses, _ = go(data, tmp_path/'run', save_every=5)
    assert torch.equal(weights, straight[0]) and losses == straight[1] and checkpoints(tmp_path/'run') == [10, 12]
    assert all(x > 0 for x in series(read_metrics(tmp_path/'run'), 'tokens_per_s')[1])

@pytest.mark.parametrize('how', ['start', 'log', 'hang'])
def test_a_tracker_that_fails_changes_nothing(data, tmp_path, monkeypatch, straight, how):
    import threading
    def broken(folder, config, step):
        if how == 'start': raise OSError('no network')
        return (lambda *a: threading.Event().wait(30) if how == 'hang' else 1 / 0), print
    monkeypatch.setitem(TRACKERS, 'broken', broken)
    monkeypatch.setattr('nanochat.record.Trackers.finish', lambda self, result, real=__import__('nanochat.record').record.Trackers.finish: real(self, result, .1))
    (weights, losses, _), said = quiet(go, data, tmp_path/'run', 'broken')
    assert torch.equal(weights, straight[0]) and losses == straight[1] and sum('tracker broken failed' in s for s in said) == 1

def test_a_record_that_cannot_be_written_changes_nothing(data, tmp_path, monkeypatch, straight):
    def fail(self, line): raise OSError(errno.EIO, os.strerror(errno.EIO))
    with monkeypatch.context() as m:
        m.setattr(Run, '_append', fail)
        (weights, _, result), said = quiet(go, data, tmp_path/'run')
    assert torch.equal(weights, straight[0]) and len(said) == 1 and result['steps'] == 12

@pytest.mark.parametrize('error', ['EIO', 'ENOSPC', 'EROFS', 'EACCES'])
def test_the_kth_request_of_a_record_fails(tmp_path, monkeypatch, error):
    "Opening and finishing fail with a sentence, logging with a warning; what was there stays readable"
    def use(folder):
        run = Run(folder, dict(lr=.1))
        run.truncate_after(1)
        for step in (2, 3): run.log(step, loss=1.)
        return run.finish(dict(bpb=2.))
    folder = tmp_path/'run'
    use(folder)
    for k in range(1, 100):
        left = [k]
        def wrap(real):
            def call(*a, **kw):
                left[0] -= 1
                if left[0] == 0: raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))
                return real(*a, **kw)
            return call
        with monkeypatch.context() as m:
            m.setattr('nanochat.record.environment', lambda: {})
            m.setattr('nanochat.record.open', wrap(builtins.open), raising=False)
            for where, f in ((os, 'fsync'), (os, 'replace'), (os, 'truncate'), (os, 'open'), (Path, 'mkdir'), (Path, 'unlink'), (Path, 'read_bytes')): m.setattr(where, f, wrap(getattr(where, f)))
            try: _, said = quiet(use, folder)
            except UserError as e: assert '\n' not in str(e) and str(folder) in str(e)
            else:
                if left[0] > 0: break
                assert len(said) <= 1
        assert all(math.isfinite(x) for x in read_metrics(folder).get('loss', [])) and not list(folder.glob('.*'))
        read_sessions(folder)
    assert 15 < k < 99 and use(folder) == read_result(folder)

def test_a_folder_that_may_only_be_read(deaths):
    "By somebody who is not root, or root would be let in"
    if not deaths[1]['refused']: pytest.skip('needs root, to become somebody else')
    for folder, says in deaths[1]['refused']: assert says == f'cannot open the run folder {folder}: permission denied' or f'cannot write {folder}/config.json: permission denied' == says

def test_one_bit_in_any_file_is_found_or_harmless(data, tmp_path, monkeypatch):
    "Of everything that a model is made of and read from: told by a sentence, or what comes out is the same. Only measurements have no hash"
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path))
    monkeypatch.setattr('nanochat.checkpoint.environment', lambda *a: {})
    shutil.copytree(data, tmp_path/'data/world')
    TOK.save(tmp_path/'tokenizer/t')
    model, optimizer, loader = parts(data)
    run = Run(tmp_path/'base/tiny', dict(lr=.1))
    tr.train(model, optimizer, loader, R, run, ('t', TOK.hash), save_every=6)
    run.finish(dict(bpb=1.))
    def content():
        m, tok, _ = load_model('base', 'tiny', device='cpu')
        return (list(documents(tmp_path/'data/world', 'train')), list(documents(tmp_path/'data/world', 'val')), tok.encode('The cat'), tok.decode([84, 104]),
                [p.tolist() for p in m.parameters()], finished(run.folder, dict(lr=.1)) is not None)
    good, rng, found, files = content(), random.Random(0), 0, []
    for path in sorted(p for p in tmp_path.rglob('*') if p.is_file() and p.name not in ('metrics.jsonl', 'sessions.jsonl', 'result.json')):
        if 'step-000006' in str(path) or path.name == 'optim.safetensors' or path.name.startswith('.'): continue
        raw = path.read_bytes(); files.append(path.name)
        for place in rng.sample(range(len(raw)), 5):
            data_ = bytearray(raw); data_[place] ^= 1 << rng.randrange(8); path.write_bytes(data_)
            try: got, said = quiet(content)
            except UserError: found += 1
            else: assert said and 'damaged' in said[0] or got == good, (path.name, place)
        path.write_bytes(raw)
    assert content() == good and found > 10 and {'config.json', 'manifest.json', 'model.safetensors', 'state.json'} <= set(files) and len(files) >= 7, files

# --- minutes

@pytest.mark.slow
def test_fifty_kills_of_a_run(data, tmp_path):
    "SIGKILL at random moments, thrice in each of seventeen runs; after each it goes on, and ends equal to the bit"
    report = world(data, tmp_path/'fifty', '''
        together('straight')
        rng, kills, lost = random.Random(2), 0, 0
        for i in range(50):
            name = f'killed-{i // 3}'
            if i % 3 == 0: before = 0
            pid = fork(work, name, save_every=2, pace=.02)
            goal, metrics, end = 4 * (i % 3) + rng.randrange(4), out/name/'metrics.jsonl', time.time() + 60
            while time.time() < end and goal and not (metrics.exists() and metrics.read_bytes().count(b'"step"') >= goal): time.sleep(.001)
            time.sleep(rng.uniform(0, .03))
            os.kill(pid, signal.SIGKILL)
            kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
            path = ck.latest(out/name)
            now = int(path.name[5:]) if path else 0
            lost += now < before; before = now
        ends = [together(f'killed-{i}', save_every=2)[0] for i in range(17)]
        print(json.dumps(dict(kills=kills, lost=lost, ends=ends)))''', timeout=900)
    print(report)
    assert report['kills'] >= 40 and report['lost'] == 0 and report['ends'] == [[0]] * 17
    for i in range(17): assert reports(tmp_path/'fifty', f'killed-{i}') == reports(tmp_path/'fifty', 'straight')

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='signals of POSIX')
def test_torchrun_starts_the_dead_again(tmp_path, monkeypatch):
    "`--max-restarts`: one of two is killed by signal 9; torchrun starts both again, and the run ends as one that nobody disturbed"
    import signal
    from conftest import MICRO, ROOT, reaches, script
    for args in (('data', 'prepare', '--name', 'micro', '--docs', 300, '--val-docs', 20), ('tok_train', '--data', 'micro', '--tag', 'micro', '--vocab-size', 512)):
        assert script(*args, base=tmp_path).returncode == 0
    def start(tag): return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--max-restarts=2', ROOT/'tests/slow_base_train.py', '12', '.5', *MICRO,
         '--batch-tokens', '1152', '--device', 'cpu', '--save-every', '5', '--tag', tag], env={**os.environ, 'NANOCHAT_BASE_DIR': str(tmp_path), 'OMP_NUM_THREADS': '1', 'NANOCHAT_COMMAND': '1'},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    def end(p):
        out, err = p.communicate(timeout=400)
        assert p.returncode == 0, err[-3000:]
        return json.loads(out.splitlines()[-1])
    straight, p = end(start('straight')), start('killed')
    assert reaches(tmp_path/'base/killed/metrics.jsonl', 12, p)
    workers = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(p.pid)], capture_output=True, text=True).stdout.split()
    rank = {int(w): dict(s.split('=', 1) for s in Path(f'/proc/{w}/environ').read_text().split('\0') if '=' in s).get('RANK') for w in workers}
    os.kill(next(pid for pid, r in rank.items() if r == '1'), signal.SIGKILL)
    again = end(p)
    assert len(read_sessions(tmp_path/'base/killed')) == 2 and series(read_metrics(tmp_path/'base/killed'), 'loss')[0] == list(range(1, 41))
    for k in ('steps', 'tokens', 'train_loss', 'val_bpb', 'val_loss', 'ledger'): assert again[k] == straight[k], k
