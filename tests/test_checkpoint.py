"Checkpoints under fire: real kills, real limits, every file, every request to the disk. One child process is reused: importing torch is slow"
import json, os, random, subprocess, sys, textwrap, warnings
import numpy as np, pytest, torch
from nanochat.checkpoint import checkpoints, latest, load_checkpoint, load_model, rng_state, save_checkpoint, set_rng_state, verify_checkpoint
from nanochat.common import UserError, run_dir
from nanochat.gpt import GPT
from nanochat.head import lm_loss
from nanochat.optim import make_optimizer
from nanochat.scaling import gpt_config, recipe
from nanochat.tokenizer import Tokenizer

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Small tensors: threads that wait for each other cost more than they give"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

R = recipe(1, 256, 32, steps=30, batch_tokens=128)

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
    monkeypatch.setattr('nanochat.checkpoint.VERSION', 2)
    with pytest.raises(UserError, match='layout version 1, and this program reads version 2'): verify_checkpoint(path)

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
    r = recipe(2, 512, 64, steps=10, batch_tokens=256)
    model = GPT(gpt_config(r)); opt = make_optimizer(model, r)
    def save(run, step): return ck.save_checkpoint(run, step, model, 'h', optimizer=opt, state=dict(step=step))
    def child(f):
        pid = os.fork()
        if pid == 0:
            try: f(); code = 0
            except UserError as e: (out/'sentence').write_text(str(e)); code = 3
            except BaseException as e: (out/'sentence').write_text(repr(e)); code = 4
            os._exit(code)
        return pid
    def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    # 1. kill -9 at random moments of a process that saves without end
    rng, kills = random.Random(0), []
    def forever():
        for step in range(2, 100_000): save(out/'kill', step)
    t = time.time(); save(out/'kill', 1); one = time.time() - t
    for i in range(6):
        before = max(ck.checkpoints(out/'kill'))
        pid = child(forever if i == 0 else lambda: [save(out/'kill', s) for s in range(before + 1, 100_000)])
        time.sleep(rng.uniform(0.2, 4) * one)
        os.kill(pid, signal.SIGKILL); wait(pid)
        path = ck.latest(out/'kill')
        ok = path is not None and ck.load_checkpoint(path)['state']['step'] >= before
        kills.append([ok, len(list((out/'kill/checkpoints').glob('.*')))])
    report['kills'] = kills

    # 2. death at the k-th request to the disk, for all k; a save of a new step, and of the same step again
    for name, again in (('new', 2), ('same', 1)):
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
                for mod, f in ((os, 'fsync'), (os, 'rename'), (shutil, 'rmtree'), (Path, 'write_text'), (Path, 'mkdir'), (ck, 'save_file')):
                    setattr(mod, f, wrap(getattr(mod, f)))
                save(run, again)
            code = wait(child(dying))
            path = ck.latest(run)
            whole = path is not None and ck.load_checkpoint(path) is not None
            save(run, 3)                                        # and the next save works and tidies up
            tidy = sorted(p.name for p in (run/'checkpoints').iterdir())
            deaths.append([code, whole, ck.latest(run).name == 'step-000003' and not [n for n in tidy if n.startswith('.')]])
            shutil.rmtree(run); k += 1
            if code == 0: break
        report[name] = deaths

    # 3. a file may not grow: RLIMIT_FSIZE with its signal ignored
    run = out/'limit'; save(run, 1)
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save(run, 2)
    code = wait(child(limited))
    report['limit'] = [code, (out/'sentence').read_text(), ck.latest(run).name, [p.name for p in (run/'checkpoints').iterdir()]]
    print(json.dumps(report))
''')

@pytest.fixture(scope='module')
def fire(tmp_path_factory):
    "Report of the child process"
    if not hasattr(os, 'fork'): pytest.skip('needs fork')
    out = tmp_path_factory.mktemp('fire')
    p = subprocess.run([sys.executable, '-c', CHILD, out], capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])

def test_kill_9_during_a_save_leaves_a_whole_checkpoint(fire):
    assert len(fire['kills']) == 6 and all(ok for ok, _ in fire['kills'])
    assert all(rubbish <= 2 for _, rubbish in fire['kills'])

@pytest.mark.parametrize('name', ['new', 'same'])
def test_death_at_each_request_to_the_disk(fire, name):
    *died, through = fire[name]
    assert len(died) > 8 and all(code == -9 for code, *_ in died) and through[0] == 0
    assert all(whole for _, whole, _ in fire[name]), 'a death left nothing loadable'
    assert all(tidy for *_, tidy in fire[name]), 'the next save left rubbish'

def test_a_file_that_cannot_grow(fire):
    code, sentence, name, left = fire['limit']
    assert code == 3 and 'cannot save checkpoint' in sentence and 'earlier checkpoints are untouched' in sentence and '\n' not in sentence
    assert name == 'step-000001' and left == ['step-000001']

@pytest.mark.parametrize('error', ['ENOSPC', 'EDQUOT', 'EIO', 'EROFS'])
def test_the_kth_request_fails(saved, monkeypatch, error):
    import errno, nanochat.checkpoint as ck
    from pathlib import Path
    run, model, opt, path = saved
    monkeypatch.setattr(ck, 'environment', lambda *a: {})
    for k in range(1, 40):
        left = [k]
        def wrap(real):
            def call(*a, **kw):
                left[0] -= 1
                if left[0] == 0: raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))
                return real(*a, **kw)
            return call
        with monkeypatch.context() as m:
            for mod, f in ((os, 'fsync'), (os, 'rename'), (Path, 'write_text'), (ck, 'save_file')): m.setattr(mod, f, wrap(getattr(mod, f)))
            try: save_checkpoint(run, 2, model, 'h' * 64, optimizer=opt)
            except UserError as e:
                assert ('the disk is full' in str(e)) == (error in ('ENOSPC', 'EDQUOT')) and 'untouched' in str(e) and '\n' not in str(e)
            else: break
        verify_checkpoint(path)
        assert not list((run/'checkpoints').glob('.*.tmp'))
    assert 5 < k < 39 and latest(run).name == 'step-000002'
