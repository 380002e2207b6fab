"The bench of inference: what it counts is right, what it measures is what the engine does. No test looks at a clock"
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode
from nanochat.common import UserError
from nanochat.engine import Engine, Sampling
from nanochat.gpt import GPT, GPTConfig
from nanochat.int8 import quantize
from nanochat.precision import for_inference
from nanochat.scripts import infer_bench as B
from nanochat.tokenizer import train_bpe
from conftest import result, script

pytestmark = pytest.mark.usefixtures('one_thread')

def model_of(**kw):
    torch.manual_seed(0)
    cfg = dict(vocab_size=320, n_layer=3, n_head=4, n_kv_head=2, head_dim=8, max_len=64, window_pattern='SL', short_window=5)
    return for_inference(GPT(GPTConfig(**{**cfg, **kw})))

ALL = dict(value_embeds=True, layer_scales=True, smear=True, backout=True)

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.sampled_from(['L', 'S', 'SL']), st.sampled_from([1, 2, 4]))
def test_bytes_and_operations_by_hand(lengths, pattern, kv):
    model = model_of(window_pattern=pattern, n_kv_head=kv, **ALL)
    seen = sum(min(n, 6) if w else n for w in model.cfg.windows for n in lengths)
    tables = [model.wte.weight, *(t.weight for t in model.value_embeds.values())]
    others = sum(p.nbytes for p in model.parameters() if not any(p is t for t in tables))
    assert B.step_bytes(model, lengths) == others + len(lengths)*sum(t[0].nbytes for t in tables) + seen*2*kv*8*4
    n = model.num_params()
    assert B.step_flops(model.cfg, lengths) == 2*(n['matrix'] + n['head'])*len(lengths) + 4*32*seen

@pytest.mark.parametrize('rows, length', [(1, 1), (3, 20)])
def test_operations_against_torchs_counter(rows, length):
    "Full attention, no gates: every product of a cached step, as torch counts them"
    model = model_of(window_pattern='L', n_kv_head=4)
    cache = model.new_cache(rows)
    if length > 1: model(torch.zeros(rows, length - 1, dtype=torch.long), cache); cache.advance(length - 1)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter: model.logits(model(torch.zeros(rows, 1, dtype=torch.long), cache))
    assert B.weights_multiplied(model.cfg)*2*rows <= counter.get_total_flops() <= B.step_flops(model.cfg, [length]*rows)
    attention = 4*32*3*rows*length
    assert B.step_flops(model.cfg, [length]*rows) - counter.get_total_flops() in (0, attention)          # the counter may not know the CPU's attention

def test_a_step_of_int8_reads_a_quarter_of_the_matrices():
    model = model_of()
    small = quantize(model)
    n = model.num_params()
    matrices, outputs = n['matrix'] + n['head'], sum(m.out_features for m in small.modules() if hasattr(m, 'codes'))
    assert B.held_bytes(model) == 4*n['total'] and B.held_bytes(small) == 4*n['embedding'] + matrices + 4*outputs
    assert B.step_bytes(model, [9]) - B.step_bytes(small, [9]) == 3*matrices - 4*outputs

def test_the_cache_that_is_counted_is_the_cache_that_is_held():
    model = model_of(window_pattern='L')
    cache = model.new_cache(2, 16)
    assert B.step_bytes(model, [16, 16]) - 2*model.wte.weight[0].nbytes - model.lm_head.weight.nbytes - 4*model.num_params()['matrix'] == cache.nbytes

@given(st.floats(1, 1e12), st.floats(1, 1e12), st.floats(1, 1e6), st.floats(1, 1e6))
def test_no_floor_is_below_either_limit(b, f, read, products):
    s = B.floor_seconds(b, f, read, products)
    assert s >= b/read and s >= f/products and (s == b/read or s == f/products)

def test_the_floor_of_an_answer_is_the_sum_of_its_steps():
    model = model_of()
    got = B.answer_floor(model, 2, 5, 4, 100., 1e3)
    steps = [[5 + k]*2 for k in (1, 2, 3)]
    assert got['bytes'] == sum(B.step_bytes(model, s) for s in steps) and got['flops'] == sum(B.step_flops(model.cfg, s) for s in steps)
    assert got['seconds'] == pytest.approx(sum(max(B.step_bytes(model, s)/100, B.step_flops(model.cfg, s)/1e3) for s in steps))

@pytest.fixture
def engine():
    tok = train_bpe(['a small cat sat on a small mat. '*9], 300)
    return Engine(model_of(), tok, tool=None, max_rows=4)

def test_prompts_differ_and_hold_no_marks(engine):
    tok = engine.tok
    marks = {tok.special(n) for n in tok.specials}
    a, b = (B.random_prompts(tok, 4, 20, seed) for seed in (1, 2))
    assert a == B.random_prompts(tok, 4, 20, 1) and len({tuple(p) for p in a + b}) == 8
    assert all(p[0] == tok.bos and len(p) == 20 and not marks & set(p[1:]) for p in a + b)

@pytest.mark.parametrize('rows', [1, 3])
def test_what_is_timed_is_what_the_engine_does(engine, rows, monkeypatch):
    "The prompt before the first event, one step for each later token: counted on the model, with a clock that counts calls"
    read, ticks = [], iter(range(1000))
    engine.model.register_forward_hook(lambda m, args, out: read.append(tuple(args[0].shape)))
    monkeypatch.setattr(B, 'clock', lambda device: (next(ticks), len(read))[0])
    took = B.generate(engine, B.random_prompts(engine.tok, rows, 12, 0), 6)
    assert set(took) == {'first', 'rest'} and took['first'] > 0 and took['rest'] > 0
    assert sum(b*t for b, t in read if t == 1) == rows*5 and sum(b*t for b, t in read if t > 1) == rows*12

def test_no_row_ends_early_whatever_the_model_wants(engine):
    "Even a model that would say nothing but the end mark"
    end = engine.tok.special('assistant_end')
    torch.nn.init.zeros_(engine.model.lm_head.weight)
    logits = type(engine.model).logits
    engine.model.logits = lambda h: logits(engine.model, h).index_fill(-1, torch.tensor([end, engine.tok.bos]), 14.)
    assert len(engine.complete([[engine.tok.bos, 3]], Sampling(max_tokens=9))[0].ids) == 1
    B.generate(engine, [[engine.tok.bos, 3]], 9)

def test_an_answer_that_is_too_short_is_an_error(engine):
    with pytest.raises(RuntimeError, match='5 tokens came for 1 rows of 9'):
        B.generate(engine, B.random_prompts(engine.tok, 1, engine.model.cfg.max_len - 5, 0), 9)

def test_peak_counts_bytes_that_are_alive_at_once():
    def f():
        a = torch.zeros(2**18)                          # 1 MiB
        b = a + 1                                       # 2 at once
        del a
        return b.view(-1, 2) + b.view(-1, 2)            # views are no memory
    assert B.peak_mib(f, 'cpu') == 2
    old = torch.zeros(2**20)
    def g():
        for _ in range(3): x = old[:2**18].clone(); del x
        return old.view(4, -1)[1]
    assert B.peak_mib(g, 'cpu') == 1                    # what was there before does not count, and memory that came back is free

def test_kinds_take_turns_and_gain_is_of_pairs(engine, monkeypatch):
    seen, times = [], iter([9, 9, 4, 2, 3, 6, 8, 2])     # the warm-up, then pairs; small, plain | plain, small | …
    def fake(e, prompts, new):
        assert not e.store.max_bytes                      # nothing is remembered, not even where a prompt is asked twice
        seen.append((kind_of[id(e.model)], prompts))
        return dict(first=1., rest=float(next(times)))
    model = engine.model
    small = quantize(model)
    kind_of = {id(model): 'plain', id(small): 'small'}
    monkeypatch.setattr(B, 'generate', fake); monkeypatch.setattr(B, 'peak_mib', lambda f, device: 1.)
    out = B.bench_rows(dict(plain=model, small=small), engine.tok, 1, 8, 4, 1e9, 1e9, tries=3)
    order = [k for k, _ in seen]
    assert order == ['small', 'plain', 'plain', 'small', 'small', 'plain', 'plain', 'small'] and seen[2][1] == seen[3][1] != seen[4][1]
    assert out['plain']['gain'] == 1 and out['small']['gain'] == 2.                     # of 4/2, 6/3 and 8/2
    assert out['plain']['step_ms'] == pytest.approx(1e3*6/3) and out['small']['tok_s'] == pytest.approx(3/2)

def test_bad_sizes_are_one_sentence():
    for args, words in ((('0', 4, 4, 64), 'such as 1,8,32'), (('1,x', 4, 4, 64), 'such as 1,8,32'), (('1', 60, 8, 64), 'lower one of them'),
                        (('1', 4, 1, 64), '2 or more'), (('1', 0, 4, 64), '1 or more')):
        with pytest.raises(UserError, match=words): B._sizes(*args)
    assert B._sizes('1,8', 32, 32, 64) == [1, 8]

def numbers(x):
    for v in x.values() if isinstance(x, dict) else x:
        if isinstance(v, (dict, list)): yield from numbers(v)
        elif isinstance(v, float): yield v

def test_a_new_model_from_the_command_line(tmp_path):
    r = script('infer_bench', '--depth', 1, '--vocab-size', 320, '--rows', '1,3', '--prompt', 12, '--new', 4, '--tries', 1, '--int8', '--device', 'cpu', base=tmp_path)
    assert r.returncode == 0, r.stderr
    out = result(r)
    assert [list(k['lines'][1]) for k in out['kinds'].values()][0] == list(out['kinds']['int8']['lines'][0])
    assert all(math.isfinite(v) and v > 0 for v in numbers(out)) and out['environment']['device'] == 'cpu' and out['int8_levels'] in (64, 127)
    assert out['kinds']['int8']['weights_mib'] < out['kinds']['float32']['weights_mib'] and not list(tmp_path.iterdir())
    bad = script('infer_bench', '--depth', 1, '--new', 1, '--device', 'cpu', base=tmp_path)
    assert bad.returncode == 1 and bad.stderr.startswith('error: --prompt must be') and bad.stderr.count('\n') == 1

def test_a_trained_run_has_bits_per_byte(small_run):
    r = script('infer_bench', '--tag', 'small', '--stage', 'base', '--rows', '2', '--prompt', 16, '--new', 4, '--tries', 1, '--int8', '--device', 'cpu', base=small_run)
    assert r.returncode == 0, r.stderr
    out = result(r)
    before, after = (k['bpb'] for k in out['kinds'].values())
    assert before < 1 and abs(after/before - 1) < .001 and out['tag'] == 'small' and out['step'] > 0
