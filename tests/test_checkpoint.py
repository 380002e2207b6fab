"Checkpoints under fire: real kills, real limits, every file, every request to the disk. One child process is reused: importing torch is slow"
import errno, json, math, os, random, shutil, subprocess, sys, textwrap, threading, time, warnings
from pathlib import Path
import numpy as np, pytest, torch
import nanochat.checkpoint as ck
from nanochat.checkpoint import (MIGRATIONS, VERSION, Saver, best, checkpoints, latest, load_checkpoint, load_model, rng_state,
                                 save_checkpoint, score_checkpoint, set_rng_state, verify_checkpoint)
from nanochat.common import UserError, run_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.head import lm_loss
from nanochat.optim import make_optimizer
from nanochat.scaling import gpt_config, recipe
from nanochat.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures('one_thread')

R = recipe(1, 256, 32, steps=30, batch_tokens=128)
FIXTURES = Path(__file__).resolve().parent/'fixtures'

def fresh(seed=0):
    torch.manual_seed(seed)
    model = GPT(gpt_config(R))
    return model, make_optimizer(model, R)

def train(model, opt, n):
    for _ in range(n):
        ids = torch.randint(256, (2, 33)) + 0 * random.randrange(9) + 0 * int(np.random.randint(9))      # all three generators move
        opt.zero_grad(); lm_loss(model, ids[:, :-1], ids[:, 1:]).backward(); opt.step()
    return [p.detach().clone() for p in model.parameters()]

@pytest.fixture
def saved(tmp_path):
    model, opt = fresh()
    train(model, opt, 1)
    return tmp_path, model, opt, save_checkpoint(tmp_path, 1, model, 'h' * 64, optimizer=opt, state=dict(rng=rng_state(), note='é'))

def quiet(f, *a):
    "(result, warnings)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return f(*a), [str(w.message) for w in caught]

def flip(path, byte, bit):
    data = bytearray(path.read_bytes()); data[byte] ^= 1 << bit
    path.write_bytes(data)

def test_resume_is_equal_to_the_bit(saved):
    _, model, opt, path = saved
    set_rng_state(load_checkpoint(path)['state']['rng'])
    straight, draws = train(model, opt, 4), (random.random(), np.random.rand(), torch.rand(2).tolist())
    again, opt2 = fresh(5)
    train(again, opt2, 3)
    c = load_checkpoint(path)
    again.load_state_dict(c['model']); opt2.load_tensors(c['optim']); set_rng_state(c['state']['rng'])
    assert all(torch.equal(a, b) for a, b in zip(straight, train(again, opt2, 4)))
    assert draws == (random.random(), np.random.rand(), torch.rand(2).tolist()) and c['state']['note'] == 'é'

def test_a_bit_in_any_file_is_found_and_named(saved):
    run, *_, path = saved
    rng = random.Random(1)
    files = sorted(path.iterdir())
    assert [f.name for f in files] == ['manifest.json', 'model.safetensors', 'optim.safetensors', 'state.json']
    for f in files:
        good = f.read_bytes()
        for place in {0, 7, len(good) - 1, *rng.sample(range(len(good)), 25)}:
            flip(f, place, rng.randrange(8))
            with pytest.raises(UserError, match=f'{f.name} is damaged'): load_checkpoint(path)
            f.write_bytes(good)
        for other in (good[:-1], good + b' ', b''):                                    # cut, longer, empty
            f.write_bytes(other)
            with pytest.raises(UserError, match=f'{f.name} is damaged'): verify_checkpoint(path)
        f.unlink()
        with pytest.raises(UserError, match=f'{f.name} is missing'): verify_checkpoint(path)
        assert quiet(latest, run) == (None, quiet(latest, run)[1]) and f.name in quiet(latest, run)[1][0]
        f.write_bytes(good)
    assert latest(run) == path

def test_latest_falls_back_and_says_so(saved):
    run, model, opt, path = saved
    newer = save_checkpoint(run, 2, model, 'h' * 64, optimizer=opt)
    assert latest(run) == newer
    flip(newer/'optim.safetensors', 99, 3)
    found, said = quiet(latest, run)
    assert found == path and len(said) == 1 and 'step-000002/optim.safetensors is damaged' in said[0]
    _, said = quiet(lambda: save_checkpoint(run, 2, model, 'h' * 64, optimizer=opt))   # training on from step 1 replaces it
    assert latest(run).name == 'step-000002' and not said

def test_keep_last_k(tmp_path):
    model, _ = fresh()
    for step in range(1, 8): save_checkpoint(tmp_path, step, model, 'h', keep=3)
    assert checkpoints(tmp_path) == [5, 6, 7] and len(list((tmp_path/'checkpoints').iterdir())) == 3
    save_checkpoint(tmp_path, 8, model, 'h', keep=1)
    assert checkpoints(tmp_path) == [8]
    for step in (9, 10): save_checkpoint(tmp_path, step, model, 'h', keep=0)
    assert checkpoints(tmp_path) == [8, 9, 10]
    save_checkpoint(tmp_path, 1_000_000, model, 'h', keep=0); save_checkpoint(tmp_path, 10_000_000, model, 'h')
    assert checkpoints(tmp_path) == [1_000_000, 10_000_000]                            # order by number, not by name

def test_an_abandoned_future_is_set_aside_not_lost(tmp_path):
    model, _ = fresh()
    for step in (10, 20): save_checkpoint(tmp_path, step, model, 'h')
    for _ in range(2):
        _, said = quiet(lambda: save_checkpoint(tmp_path, 15, model, 'h'))
        assert checkpoints(tmp_path)[-1] == 15
        save_checkpoint(tmp_path, 20, model, 'h')
    assert {'step-000020.aside', 'step-000020.aside1'} <= {p.name for p in (tmp_path/'checkpoints').iterdir()}
    assert 'step-000020 is later than step 15' in said[0]

def test_state_that_is_no_json_touches_nothing(saved):
    run, model, _, path = saved
    with pytest.raises(TypeError): save_checkpoint(run, 2, model, 'h', state=dict(x={1, 2}))
    assert checkpoints(run) == [1] and len(list((run/'checkpoints').iterdir())) == 1

def test_load_model_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path))
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    model, opt = fresh()
    path = save_checkpoint(run_dir('base', 'a'), 3, model, tok.hash, tokenizer='t1', optimizer=opt)
    with pytest.raises(UserError, match='no tokenizer in .*t1'): load_model('base', 'a', device='cpu')
    tok.save(tmp_path/'tokenizer/t1')
    state = torch.get_rng_state()
    got, tok2, manifest = load_model('base', 'a', device='cpu')
    assert torch.equal(torch.get_rng_state(), state)                                   # loading draws no random numbers
    ids = torch.randint(256, (2, 9))
    with torch.no_grad(): assert torch.equal(got.logits(got(ids)), model.logits(model(ids)))
    assert tok2.hash == tok.hash and manifest['tokenizer'] == 't1' and not got.training
    assert all(p.requires_grad for p in got.parameters())
    before = path/'model.safetensors', (path/'model.safetensors').read_bytes()
    with open(before[0], 'r+b') as f: f.seek(len(before[1]) // 2); f.write(b'x' * 5000)      # the file changes under a loaded model
    with torch.no_grad(): assert torch.equal(got.logits(got(ids)), model.logits(model(ids)))
    before[0].write_bytes(before[1])
    other = Tokenizer({bytes([i]): (i + 1) % 256 for i in range(256)})
    with pytest.raises(UserError, match='another tokenizer') as e: load_model('base', 'a', device='cpu', tok=other)
    assert tok.hash[:12] in str(e.value) and other.hash[:12] in str(e.value) and '\n' not in str(e.value)
    other.save(tmp_path/'tokenizer/t1')                                                # retrained under the same tag
    with pytest.raises(UserError, match='another tokenizer'): load_model('base', 'a', device='cpu')
    with pytest.raises(UserError, match='there are 3'): load_model('base', 'a', step=4, device='cpu')
    with pytest.raises(UserError, match='train it first'): load_model('base', 'b', device='cpu')
    with pytest.raises(UserError, match='cannot be a folder name'): load_model('base', '../a', device='cpu')
    flip(path/'model.safetensors', 500, 0)
    with pytest.raises(UserError, match='model.safetensors is damaged'): load_model('base', 'a', step=3, device='cpu', tok=tok)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(UserError, match='no whole checkpoint'): load_model('base', 'a', device='cpu', tok=tok)

def test_a_layout_of_the_future_is_refused(saved, monkeypatch):
    run, model, opt, path = saved
    monkeypatch.setattr('nanochat.checkpoint.VERSION', VERSION - 1)
    for f in (verify_checkpoint, load_checkpoint):
        with pytest.raises(UserError, match=f'layout version {VERSION}, and this program reads versions 1 to {VERSION - 1}: update'): f(path)

@pytest.mark.parametrize('version', range(1, VERSION + 1))
def test_a_checkpoint_of_every_version_loads(version):
    "Written by the code of its time, never rewritten: weights, optimizer, random states, and what the model says"
    path, expected = FIXTURES/f'checkpoint-v{version}', json.loads((FIXTURES/f'checkpoint-v{version}.json').read_text())
    assert json.loads((path/'manifest.json').read_text())['version'] == version
    assert sum(f.stat().st_size for f in path.iterdir()) < 60_000
    c = load_checkpoint(path)
    model = GPT(GPTConfig.from_dict(c['manifest']['config']))
    model.load_state_dict(c['model'])
    with torch.no_grad(): logits = model.logits(model(torch.tensor([expected['ids']])))[0, -1]
    torch.testing.assert_close(logits, torch.tensor(expected['logits']), atol=1e-4, rtol=1e-4)
    make_optimizer(model, R).load_tensors(c['optim'])
    assert c['manifest']['version'] == VERSION and {'score', 'world_size'} <= c['manifest'].keys()
    assert isinstance(c['state']['rng'], list) and c['state']['step'] == c['manifest']['step'] == 3
    set_rng_state(c['state']['rng'])
    assert [random.random(), np.random.rand(), torch.rand(2).tolist()] == expected['draws']

def test_migrations_run_one_after_another(tmp_path, monkeypatch):
    "A layout of tomorrow reads both of today's; the files stay as they are"
    monkeypatch.setattr(ck, 'VERSION', VERSION + 1)
    monkeypatch.setitem(MIGRATIONS, VERSION, lambda saved: saved['manifest'].update(new='yes'))
    for version in range(1, VERSION + 1):
        before = {f.name: f.read_bytes() for f in (FIXTURES/f'checkpoint-v{version}').iterdir()}
        manifest = load_checkpoint(FIXTURES/f'checkpoint-v{version}')['manifest']
        assert (manifest['version'], manifest['new']) == (VERSION + 1, 'yes') and 'score' in manifest
        assert before == {f.name: f.read_bytes() for f in (FIXTURES/f'checkpoint-v{version}').iterdir()}

def test_a_process_takes_its_own_random_state(monkeypatch):
    states = []
    for seed in range(3):
        torch.manual_seed(seed); states.append(rng_state())
    for world, rank, own in ((3, 2, 2), (1, 0, 0), (5, 4, 1)):                          # more processes than states: they share
        monkeypatch.setenv('WORLD_SIZE', str(world)); monkeypatch.setenv('RANK', str(rank))
        set_rng_state(states)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(own)))

@pytest.mark.parametrize('version', range(1, VERSION + 1))
def test_one_bit_at_a_hundred_places_of_each_file(tmp_path, version):
    path, rng, silent = tmp_path/'c', random.Random(version), 0
    shutil.copytree(FIXTURES/f'checkpoint-v{version}', path)
    for f in sorted(path.iterdir()):
        good = f.read_bytes()
        for place in rng.sample(range(len(good)), 100):
            flip(f, place, rng.randrange(8))
            try: verify_checkpoint(path); silent += 1
            except UserError as e: assert f'{f.name} is damaged' in str(e)
            f.write_bytes(good)
    assert silent == 0 and verify_checkpoint(path)

def test_a_hundred_saves_keep_three_and_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(ck, 'environment', lambda *a: {})
    model, rng, scores = torch.nn.Linear(2, 2), random.Random(0), {}
    model.cfg = fresh()[0].cfg
    def lowest(): return min(scores, key=scores.get) if scores else None
    for step in range(1, 101):
        new, early = rng.choice([rng.random(), math.nan, math.inf, None]), step % 2    # odd steps have it at the save, even ones later
        if early and new is not None and math.isfinite(new): scores[step] = new
        save_checkpoint(tmp_path, step, model, 'h', keep=3, score=new if early else None)
        assert set(checkpoints(tmp_path)) == {*range(max(1, step - 2), step + 1), lowest()} - {None}
        if not early and new is not None: score_checkpoint(tmp_path, step, new)
        if not early and new is not None and math.isfinite(new): scores[step] = new
        if step % 10 == 0: assert best(tmp_path).name == f'step-{lowest():06d}'
    assert len(list((tmp_path/'checkpoints').iterdir())) <= 4

def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(tmp_path):
    model, _ = fresh()
    for step in (1, 2, 3): save_checkpoint(tmp_path, step, model, 'h', keep=2, score=step)
    assert checkpoints(tmp_path) == [1, 2, 3]                                          # 1 is the best
    flip(tmp_path/'checkpoints/step-000001/model.safetensors', 300, 1)                 # ... and is damaged: 2 is
    flip(tmp_path/'checkpoints/step-000003/manifest.json', 30, 1)
    assert best(tmp_path).name == 'step-000002'
    save_checkpoint(tmp_path, 4, model, 'h', keep=2, score=9)
    assert checkpoints(tmp_path) == [2, 3, 4]
    save_checkpoint(tmp_path, 5, model, 'h', keep=2); save_checkpoint(tmp_path, 6, model, 'h', keep=2)
    assert checkpoints(tmp_path) == [2, 5, 6]
    score_checkpoint(tmp_path, 7, 1.)                                                  # nothing there: nothing happens
    score_checkpoint(tmp_path, 6, 2.)                                                  # as good as 2, and newer
    assert best(tmp_path).name == 'step-000006' and load_checkpoint(best(tmp_path))['manifest']['score'] == 2.
    save_checkpoint(tmp_path, 8, model, 'h', keep=1)
    assert checkpoints(tmp_path) == [6, 8]

def test_two_savers_in_one_folder(saved):
    "The second refuses, touches nothing, and the lock dies with its holder, even by kill -9"
    fcntl = pytest.importorskip('fcntl')
    run, model, _, path = saved
    hold = textwrap.dedent("""
        import fcntl, os, sys
        fd = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.readline()""")
    rubbish = run/'checkpoints/.step-000002.tmp'
    rubbish.mkdir()                                                                    # what the other one is writing
    p = subprocess.Popen([sys.executable, '-c', hold, run/'checkpoints'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'held\n'
        with pytest.raises(UserError, match='another process is saving in .*use another --tag') as e: save_checkpoint(run, 2, model, 'h')
        assert rubbish.exists() and checkpoints(run) == [1] and '\n' not in str(e.value)
    finally: p.kill(); p.communicate()
    assert checkpoints(run) == [1] and save_checkpoint(run, 2, model, 'h').name == 'step-000002' and not rubbish.exists()

def test_a_folder_that_cannot_be_written(tmp_path):
    model, _ = fresh()
    (tmp_path/'checkpoints').write_text('a file')
    with pytest.raises(UserError, match='cannot save checkpoint .*: (file exists|not a directory)'): save_checkpoint(tmp_path, 1, model, 'h')
    if os.geteuid() == 0: return                                                       # nothing is closed to root
    (tmp_path/'ro').mkdir(mode=0o555)
    with pytest.raises(UserError, match='permission denied'): save_checkpoint(tmp_path/'ro/run', 1, model, 'h')

def test_colleagues_may_read_what_the_umask_lets_them(saved):
    *_, path = saved
    assert len({f.stat().st_mode for f in path.iterdir()}) == 1

CHILD = textwrap.dedent('''
    import errno, json, os, random, resource, shutil, signal, sys, time, warnings
    from pathlib import Path
    import torch
    torch.set_num_threads(1); warnings.simplefilter('ignore')
    import nanochat.checkpoint as ck
    from nanochat.common import UserError
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.optim import make_optimizer
    from nanochat.scaling import gpt_config, recipe

    out, report, real_stderr = Path(sys.argv[1]), {}, os.dup(2)
    ck.environment = lambda *a: {}                              # it asks git, in a process of its own
    r, times = recipe(2, 512, 64, steps=10, batch_tokens=256), [time.time()]
    model = GPT(gpt_config(r)); opt = make_optimizer(model, r)
    def save(run, step, keep=2): return ck.save_checkpoint(run, step, model, 'h', optimizer=opt, state=dict(step=step), keep=keep, score=step % 3)
    def save_beside(run, step, keep=2):
        with ck.Saver(run) as saver: saver.save(step, model, 'h', optimizer=opt, state=dict(step=step), keep=keep)
    def child(f):
        pid = os.fork()
        if pid == 0:
            try: f(); code = 0
            except UserError as e: (out/'sentence').write_text(str(e)); code = 3
            except BaseException as e: (out/'sentence').write_text(repr(e)); code = 4
            os._exit(code)
        return pid
    def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    # 1. kill -9 at random moments of a process that saves without end, in line or beside, and removes old ones
    rng, kills = random.Random(0), []
    def forever(one, first):
        for step in range(first, 100_000): one(out/'kill', step, 1 + step % 2)
    t = time.time(); save(out/'kill', 1); took = time.time() - t
    for i in range(10):
        before = max(ck.checkpoints(out/'kill'))
        pid = child(lambda: forever((save, save_beside)[i % 2], before + 1))
        time.sleep(rng.uniform(0.2, 3) * took)
        os.kill(pid, signal.SIGKILL); wait(pid)
        path = ck.latest(out/'kill')
        ok = path is not None and ck.load_checkpoint(path)['state']['step'] >= before
        kills.append([ok, len(list((out/'kill/checkpoints').glob('.*')))])
    report['kills'] = kills; times.append(time.time())

    model = GPT(GPTConfig(vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, head_dim=8)); opt = {k: v.clone() for k, v in model.state_dict().items()}
    # 2. death at the k-th request to the disk, for all k: a new step, the same step again, one that removes the earlier, one in a thread
    for name, one, again, keep in (('new', save, 2, 2), ('same', save, 1, 2), ('purge', save, 2, 1), ('beside', save_beside, 2, 1)):
        k, deaths = 1, []
        while True:
            run = out/f'{name}{k}'; save(run, 1)
            def dying(k=k):
                left = [k]
                def wrap(real):
                    def call(*a, **kw):
                        left[0] -= 1
                        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
                        return real(*a, **kw)
                    return call
                for mod, f in ((os, 'fsync'), (os, 'rename'), (os, 'open'), (shutil, 'rmtree'), (Path, 'write_text'), (Path, 'mkdir'), (ck, 'save_file')):
                    setattr(mod, f, wrap(getattr(mod, f)))
                one(run, again, keep)
            code = wait(child(dying))
            path = ck.latest(run)
            whole = path is not None and ck.load_checkpoint(path) is not None
            save(run, 3)                                        # and the next save works and tidies up
            tidy = sorted(p.name for p in (run/'checkpoints').iterdir())
            deaths.append([code, whole, ck.latest(run).name == 'step-000003' and not [n for n in tidy if n.startswith('.')]])
            shutil.rmtree(run); k += 1
            if code == 0: break
        report[name] = deaths; times.append(time.time())

    # 3. a file may not grow: RLIMIT_FSIZE with its signal ignored
    run = out/'limit'; save(run, 1)
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
        save(run, 2)
    code = wait(child(limited))
    report['limit'] = [code, (out/'sentence').read_text(), ck.latest(run).name, [p.name for p in (run/'checkpoints').iterdir()]]
    report['times'] = [round(b - a, 1) for a, b in zip(times, times[1:])]
    print(json.dumps(report))
''')

@pytest.fixture(scope='module')
def fire(tmp_path_factory):
    "Report of the child process"
    if not hasattr(os, 'fork'): pytest.skip('needs fork')
    out = tmp_path_factory.mktemp('fire')
    p = subprocess.run([sys.executable, '-c', CHILD, out], capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])

def test_kill_9_during_a_save_leaves_a_whole_checkpoint(fire):
    assert len(fire['kills']) == 10 and all(ok for ok, _ in fire['kills'])
    assert all(rubbish <= 2 for _, rubbish in fire['kills'])

@pytest.mark.parametrize('name', ['new', 'same', 'purge', 'beside'])
def test_death_at_each_request_to_the_disk(fire, name):
    *died, through = fire[name]
    assert len(died) > 8 and all(code == -9 for code, *_ in died) and through[0] == 0
    assert all(whole for _, whole, _ in fire[name]), 'a death left nothing loadable'
    assert all(tidy for *_, tidy in fire[name]), 'the next save left rubbish'

def test_a_file_that_cannot_grow(fire):
    code, sentence, name, left = fire['limit']
    assert code == 3 and 'cannot save checkpoint' in sentence and 'earlier checkpoints are untouched' in sentence and '\n' not in sentence
    assert name == 'step-000001' and left == ['step-000001']

def failing(monkeypatch, k, error):
    "The k-th request to the disk raises"
    left = [k]
    def wrap(real):
        def call(*a, **kw):
            left[0] -= 1
            if left[0] == 0: raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))
            return real(*a, **kw)
        return call
    for mod, f in ((os, 'fsync'), (os, 'rename'), (os, 'open'), (Path, 'mkdir'), (Path, 'write_text'), (ck, 'save_file'), (shutil, 'copymode')):
        monkeypatch.setattr(mod, f, wrap(getattr(mod, f)))
    return left

@pytest.mark.parametrize('error', ['ENOSPC', 'EDQUOT', 'EIO', 'EROFS'])
def test_the_kth_request_fails(saved, monkeypatch, error):
    run, model, opt, path = saved
    monkeypatch.setattr(ck, 'environment', lambda *a: {})
    for k in range(1, 60):
        with monkeypatch.context() as m:
            failing(m, k, error)
            try: save_checkpoint(run, 2, model, 'h' * 64, optimizer=opt)
            except UserError as e:
                assert ('the disk is full' in str(e)) == (error in ('ENOSPC', 'EDQUOT')) and 'untouched' in str(e) and '\n' not in str(e)
            else: break
        verify_checkpoint(path)
        assert not list((run/'checkpoints').glob('.*.tmp'))
    assert 10 < k < 59 and latest(run).name == 'step-000002'

def test_the_kth_request_of_a_saver_fails_once(saved, monkeypatch):
    "Each time: one warning, and `close` has saved it after all"
    run, model, opt, path = saved
    monkeypatch.setattr(ck, 'environment', lambda *a: {})
    for k in range(1, 60):
        with monkeypatch.context() as m, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            left = failing(m, k, 'ENOSPC')
            with Saver(run) as saver: saver.save(1 + k, model, 'h', optimizer=opt, state=dict(k=k))
        assert load_checkpoint(latest(run))['state'] == dict(k=k)
        if left[0] > 0: break
        said = [str(w.message) for w in caught]
        assert len(said) == 1 and (said[0].endswith('(save 1 of 3 that may fail; training goes on)') or 'cannot remove the old' in said[0]), (k, said)
    assert 10 < k < 59 and not caught and not list((run/'checkpoints').glob('.*'))

# --- beside the training step

@pytest.fixture
def slow_disk(monkeypatch):
    "Saves block until `go` is set; `busy` is how many are at work, `most` the largest number of them"
    class Disk: go, busy, most = threading.Event(), 0, 0
    real = ck._save
    def slow(*args):
        Disk.busy += 1; Disk.most = max(Disk.most, Disk.busy)
        assert Disk.go.wait(120)
        try: return real(*args)
        finally: Disk.busy -= 1
    monkeypatch.setattr(ck, '_save', slow)
    yield Disk
    Disk.go.set()

def test_a_save_beside_is_the_save_in_line(tmp_path, slow_disk):
    "Training goes on while the disk is busy, and what is written is the state of the moment of `save`"
    model, opt = fresh()
    train(model, opt, 2)
    slow_disk.go.set()
    line = load_checkpoint(save_checkpoint(tmp_path/'line', 2, model, 'h', optimizer=opt, state=dict(a=[1]), score=2.))
    slow_disk.go.clear()
    with Saver(tmp_path/'beside') as saver:
        state = dict(a=[1])
        assert saver.save(2, model, 'h', optimizer=opt, state=state, score=2.) < 100      # the disk would take 120
        state['a'].append(2)
        train(model, opt, 3)
        assert checkpoints(tmp_path/'beside') == [] and slow_disk.busy == 1
        slow_disk.go.set()
    beside = load_checkpoint(latest(tmp_path/'beside'))
    for what in ('model', 'optim'): assert all(torch.equal(v, beside[what][k]) for k, v in line[what].items()) and line[what].keys() == beside[what].keys()
    assert line['state'] == beside['state'] and line['manifest'] == beside['manifest']

def test_never_two_at_once(tmp_path, slow_disk):
    model, opt = fresh()
    saved = []
    def look():                                                                        # while the main thread waits in its second save
        while saved != [1]: time.sleep(.01)
        time.sleep(.3)
        saved.append('looked')
        slow_disk.go.set()
    looking = threading.Thread(target=look, daemon=True); looking.start()
    with Saver(tmp_path) as saver:
        for step in range(1, 6): saver.save(step, model, 'h', optimizer=opt); saved.append(step)
        saver.score(5, 1.)
    looking.join()
    assert slow_disk.most == 1 and saved == [1, 'looked', 2, 3, 4, 5] and checkpoints(tmp_path) == [4, 5] and best(tmp_path).name == 'step-000005'

def test_errors_are_warned_about_then_raised(tmp_path, monkeypatch):
    model, _ = fresh()
    real, failures = ck._save, [0]
    def bad(*a):
        if failures[0] > 0:
            failures[0] -= 1
            raise UserError('no room')
        return real(*a)
    monkeypatch.setattr(ck, '_save', bad)
    saver = Saver(tmp_path, tries=3)
    def save(step): return quiet(lambda: saver.save(step, model, 'h'))[1]
    failures[0] = 2
    assert [len(save(step)) for step in (1, 2, 3, 4)] == [0, 1, 1, 0]                  # two failures, then a success: forgotten
    saver.wait()
    assert checkpoints(tmp_path) == [3, 4] and saver.failed == 0
    failures[0] = 3
    for step in (5, 6, 7): save(step)
    with pytest.raises(UserError, match='no room'): saver.save(8, model, 'h')
    failures[0] = 1                                                                    # it goes on all the same: one more is too many
    assert not save(9)
    with pytest.raises(UserError, match='no room'): saver.wait()
    assert checkpoints(tmp_path) == [3, 4]
    failures[0] = 9
    save(10)
    with pytest.raises(UserError, match='no room'): saver.close()

def test_an_error_that_is_ours_is_raised_at_once(tmp_path, monkeypatch):
    model, _ = fresh()
    monkeypatch.setattr(ck, '_save', lambda *a: 1/0)
    saver = Saver(tmp_path)
    saver.save(1, model, 'h')
    with pytest.raises(ZeroDivisionError): saver.wait()
    with pytest.raises(TypeError): Saver(tmp_path).save(1, model, 'h', state=dict(x={1}))

def test_the_first_error_is_the_one_to_hear_about(tmp_path, monkeypatch):
    model, _ = fresh()
    monkeypatch.setattr(ck, '_save', lambda *a: (_ for _ in ()).throw(UserError('no room')))
    def body():
        with Saver(tmp_path) as saver:
            saver.save(1, model, 'h')
            raise ValueError('the training')
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match='the training'): warnings.simplefilter('always'); body()
    assert any('no room' in str(w.message) for w in caught)

def test_an_interrupted_copy_is_never_written(tmp_path, monkeypatch):
    "Ctrl-C while a copy is being made, after a failed save whose buffers it reuses: neither may reach the disk"
    model, _ = fresh()
    real = ck._save
    monkeypatch.setattr(ck, '_save', lambda *a: (_ for _ in ()).throw(UserError('no room')))
    saver = Saver(tmp_path)
    saver.save(1, model, 'h'); saver._idle.wait()
    monkeypatch.setattr(ck, '_save', real)
    def half(tensors, buffers):
        next(iter(buffers.values())).fill_(7)
        raise KeyboardInterrupt
    monkeypatch.setattr(ck, '_copied', half)
    with pytest.raises(KeyboardInterrupt): quiet(lambda: saver.save(2, model, 'h'))
    saver.close()
    assert checkpoints(tmp_path) == []

def test_a_save_that_nobody_waited_for(tmp_path):
    "The program ends, by itself, by an error, by Ctrl-C: the save that was under way is finished first"
    code = textwrap.dedent("""
        import os, sys, time, torch, signal, threading
        from pathlib import Path
        import nanochat.checkpoint as ck
        from nanochat.gpt import GPT, GPTConfig
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        real, ck.environment, waiting, sent = os.fsync, lambda *a: {}, threading.Event(), []
        def slow(fd):
            if how == 'ctrl-c' and not sent:                                     # while the main thread waits for this one
                sent.append(waiting.wait(100)); time.sleep(.1); os.kill(os.getpid(), signal.SIGINT)
            time.sleep(.1); real(fd)
        os.fsync = slow
        model = GPT(GPTConfig(vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, head_dim=8))
        for how in ('return', 'error', 'ctrl-c'):
            pid = os.fork()
            if pid:
                print(how, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
                continue
            saver = ck.Saver(Path(sys.argv[1])/how)
            saver.save(1, model, 'h')
            if how == 'error': raise ValueError('boom')
            if how == 'ctrl-c':
                waiting.set()
                saver.wait()
            break""")
    if not hasattr(os, 'fork'): pytest.skip('needs fork')
    r = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True, timeout=300)
    codes = dict(line.split() for line in r.stdout.splitlines())
    assert codes == {'return': '0', 'error': '1', 'ctrl-c': codes['ctrl-c']} and codes['ctrl-c'] in ('1', '-2', '130'), r.stderr[-2000:]
    for how in codes: assert latest(tmp_path/how).name == 'step-000001' and not list((tmp_path/how/'checkpoints').glob('.*')), how
    assert 'boom' in r.stderr and 'KeyboardInterrupt' in r.stderr

# --- the loop's own state

class Rows:
    "A loader of random rows that knows where it is"
    def __init__(self): self.g = torch.Generator().manual_seed(3)
    def __next__(self):
        from types import SimpleNamespace
        ids = torch.randint(256, (4, 33), generator=self.g)
        return SimpleNamespace(inputs=ids[:, :-1], targets=ids[:, 1:].contiguous(), docs=torch.zeros(4, 32, dtype=torch.long))
    def state_dict(self): return self.g.get_state().tolist()
    def load_state_dict(self, state): self.g.set_state(torch.tensor(state, dtype=torch.uint8))

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_a_run_of_any_precision_goes_on_to_the_bit(tmp_path, precision):
    "With float16 the loss scale, too: it starts so high that steps are left out on both sides of the interruption"
    from nanochat.precision import set_precision
    from nanochat.record import Run, read_metrics
    from nanochat.train import train as run_training
    r = recipe(1, 256, 32, steps=8, batch_tokens=128)
    def go(name, stop=None):
        model, opt = fresh()
        set_precision(model, precision)
        def on_step(step, metrics):
            if step == stop: raise ZeroDivisionError
        try: run_training(model, opt, Rows(), r, Run(tmp_path/name, {}), ('t', 'h'), save_every=2, on_step=on_step)
        except ZeroDivisionError: return None
        return [*model.state_dict().values(), *opt.tensors().values()], load_checkpoint(latest(tmp_path/name))['state'], read_metrics(tmp_path/name)['loss']
    tensors, state, losses = go('straight')
    assert go('broken', stop=5) is None and checkpoints(tmp_path/'broken')[-1] == 4
    again = go('broken')
    assert all(torch.equal(a, b) for a, b in zip(tensors, again[0], strict=True)) and losses == again[2] and len(losses) == 8
    assert (state['scaler'] is not None) == (precision == 'fp16') and state['scaler'] == again[1]['scaler'] and state['loader'] == again[1]['loader']

# --- minutes

SLOW = textwrap.dedent("""
    import json, os, random, signal, sys, time, warnings
    from pathlib import Path
    import torch
    torch.set_num_threads(1); warnings.simplefilter('ignore')
    import nanochat.checkpoint as ck
    from nanochat.gpt import GPT, GPTConfig
    ck.environment = lambda *a: {}
    out, rng = Path(sys.argv[1]), random.Random(1)
    model = GPT(GPTConfig(vocab_size=8192, n_layer=4, n_head=4, n_kv_head=4, head_dim=64))
    extra = {k: v.clone() for k, v in list(model.state_dict().items())[:4]}
    one = lambda step: ck.save_checkpoint(out, step, model, 'h', optimizer=extra, state=dict(step=step))
    def beside(step):
        with ck.Saver(out) as saver: saver.save(step, model, 'h', optimizer=extra, state=dict(step=step))
    one(1); t = time.time(); one(2); took = time.time() - t
    size = sum(f.stat().st_size for f in ck.latest(out).iterdir())
    lost = left = new = 0
    for i in range(50):
        before = max(ck.checkpoints(out))
        if (pid := os.fork()) == 0: (one, beside)[i % 2](before + 1); os._exit(0)
        time.sleep(rng.uniform(0, 1.6)*took)
        os.kill(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        took *= .9 if ended else 1.1                                             # the machine may be busier now than it was, or less
        path = ck.latest(out)
        lost += path is None or ck.load_checkpoint(path)['state']['step'] < before
        left += bool(list((out/'checkpoints').glob('.*'))); new += ck.latest(out).name == f'step-{before + 1:06d}'
    print(json.dumps(dict(lost=lost, left=left, new=new, size=size, took=took)))""")

@pytest.mark.slow
def test_fifty_kills_of_a_large_save(tmp_path):
    "A minute: 30 MB, killed at a moment between its start and 1.6 times its length, which is learned on the way; some kills fall in it, some behind it, none loses anything"
    if not hasattr(os, 'fork'): pytest.skip('needs fork')
    p = subprocess.run([sys.executable, '-c', SLOW, tmp_path], capture_output=True, text=True, timeout=900)
    assert p.returncode == 0, p.stderr[-3000:]
    r = json.loads(p.stdout.splitlines()[-1])
    print(r)
    assert r['lost'] == 0 and r['left'] > 5 and r['new'] > 2 and 20e6 < r['size'] < 60e6
