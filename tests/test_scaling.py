"The dial over its whole range, and schedules for all arguments"
import json, math, random
from dataclasses import fields
import pytest, torch
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.optim import make_optimizer
from nanochat.scaling import (MAX_BATCH, MIN_BATCH, Recipe, TOKENS_PER_PARAM, batch_for, decay_for, explain, gpt_config, lr_multiplier,
                              muon_momentum, recipe, scaling_params, set_schedule)

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.mark.parametrize('vocab, max_len', [(300, 64), (2048, 512), (32_768, 2048), (50_257, 1000)])
def test_every_depth(vocab, max_len):
    last = None
    for depth in range(1, 41):
        r = recipe(depth, vocab, max_len)
        cfg = gpt_config(r)
        assert (cfg.n_embd, cfg.n_layer, cfg.vocab_size, cfg.max_len) == (64 * depth, depth, vocab, max_len)
        assert r.device_batch * r.grad_accum * r.max_len == r.batch_tokens and r.steps * r.batch_tokens == r.tokens
        assert r.device_batch * r.max_len <= max(16_384, r.max_len)
        assert 0 < r.weight_decay <= 1 and 0 < r.head_lr < 0.02 and 0 < r.embedding_lr < 1
        assert 0 <= r.warmup_steps + r.momentum_warm_steps <= r.steps and r.by_hand == ()
        assert last is None or (r.tokens > last.tokens and r.batch_tokens >= last.batch_tokens and r.head_lr < last.head_lr)
        assert Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r
        last = r

@pytest.mark.parametrize('how', [dict(window_pattern='SSL'), dict(n_kv_head=2), dict(head_dim=32, n_head=4)])
def test_operations_are_those_of_the_model_that_is_trained(how):
    r = recipe(4, 1000, flops=1e13, batch_tokens=512, **how)
    with torch.device('meta'): each = GPT(gpt_config(r)).flops_per_token()
    assert abs(r.tokens * each / 1e13 - 1) < 512 * each / 1e13

@pytest.mark.parametrize('depth', range(1, 41))
def test_every_line_of_the_table_has_its_reason(depth):
    lines = explain(r := recipe(depth, 32_768, 2048, head_lr=.001)).splitlines()
    assert [line.split()[0] for line in lines] == [name for name in r.to_dict() if name != 'by_hand']
    assert all(len(line[20:].strip().split(None, 1)[1]) > 3 for line in lines)
    assert [line.split()[0] for line in lines if line.endswith('set by hand')] == ['head_lr']

@pytest.mark.parametrize('depth', [1, 3, 4])
def test_counted_parameters_are_the_models(depth):
    with torch.device('meta'): n = GPT(gpt_config(recipe(depth, 1000))).num_params()
    assert scaling_params(depth, 64 * depth, 1000) == n['matrix'] + n['head']

@pytest.mark.parametrize('depth', [1, 2, 4, 8, 12, 20, 24])
def test_spellings_of_the_length_agree(depth):
    r = recipe(depth, 4096)
    params = scaling_params(depth, 64 * depth, 4096)
    assert recipe(depth, 4096, tokens=r.tokens) == recipe(depth, 4096, tokens_per_param=r.tokens / params) == r
    assert recipe(depth, 4096, tokens_per_param=TOKENS_PER_PARAM) == r
    with torch.device('meta'): operations = r.tokens * GPT(gpt_config(r)).flops_per_token()
    assert recipe(depth, 4096, flops=operations) == r
    by_steps = recipe(depth, 4096, steps=r.steps)
    assert by_steps.steps == r.steps and (r.steps < 2000 or by_steps == r)

@pytest.mark.parametrize('steps', [1, 2, 5, 20, 300, 5000])
def test_short_runs(steps):
    r = recipe(4, 2048, steps=steps)
    assert r.steps == steps and r.batch_tokens >= MIN_BATCH
    assert r.warmup_steps + r.momentum_warm_steps <= steps
    assert recipe(4, 2048, 512, steps=steps).batch_tokens <= recipe(4, 2048, 512, steps=2 * steps).batch_tokens

def test_the_batch_law():
    values = [batch_for(10**(i / 10)) for i in range(0, 140)]
    assert values == sorted(values) and values[0] == MIN_BATCH and values[-1] == MAX_BATCH
    assert all(math.log2(v).is_integer() for v in values)

def test_lr_multiplier_for_all_arguments():
    rng = random.Random(0)
    for _ in range(1500):
        steps, warmup = rng.choice([0, 1, 2, 3, 10, 97, 400]), rng.choice([-3, 0, 1, 5, 50, 96, 97, 500])
        ratio, final = rng.choice([-1., 0., 0.01, 0.5, 0.65, 1., 3.]), rng.choice([-1., 0., 0.05, 1., 2.])
        m = [lr_multiplier(s, steps, warmup, ratio, final) for s in range(-3, steps + 4)]
        assert all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in m), (steps, warmup, ratio, final)
        inside = m[3:3 + steps]
        up = min(max(warmup, 0), steps); down = min(max(round(ratio * steps), 0), steps - up)
        assert inside[:up] == pytest.approx([(i + 1) / up for i in range(up)])                     # never interrupted
        assert all(b - a <= 1 / max(up, 1) + 1e-9 and a - b <= 1 / max(down, 1) + 1e-9 for a, b in zip(inside, inside[1:]))
        top = inside.index(max(inside)) if inside else 0
        assert inside[:top + 1] == sorted(inside[:top + 1]) and inside[top:] == sorted(inside[top:], reverse=True)
        assert steps == 0 or min(inside) > 0                                                      # no step is wasted at rate 0
    assert lr_multiplier(99, 100, 0, 0.5, 0.) == pytest.approx(1 / 50)

def test_other_schedules_stay_in_bounds():
    assert all(0.85 <= muon_momentum(s, w) <= 0.95 for s in range(-5, 700, 7) for w in (0, 1, 300))
    assert decay_for(0.02, 0) == 1 and decay_for(0.02, 10**6) < 1e-3

def test_set_schedule_over_a_run():
    torch.manual_seed(0)
    r = recipe(1, 256, 64, steps=60, warmup_steps=10, momentum=0.9)
    opt = make_optimizer(GPT(gpt_config(r)), r)
    seen = [set_schedule(opt, r, s) for s in range(-1, r.steps + 3)]
    assert all(0 <= d['lr_multiplier'] <= 1 and 0 <= d['weight_decay'] <= r.weight_decay and d['momentum'] <= 0.9 for d in seen)
    for step in (0, 9, 30, 59):
        d = set_schedule(opt, r, step)
        for g in opt.param_groups:
            assert g['lr'] == pytest.approx(getattr(r, g['role'] + '_lr') * d['lr_multiplier'])
            if g['kind'] == 'muon': assert g['momentum'] == d['momentum'] and g['weight_decay'] == d['weight_decay']
            else: assert g['weight_decay'] == 0

def test_overrides():
    r = recipe(4, 2048, steps=100, matrix_lr=0.01, batch_tokens=8192, device_batch=2, warmdown_ratio=0.3, head_dim=32, scalar_lr=None)
    assert (r.matrix_lr, r.batch_tokens, r.device_batch, r.grad_accum, r.n_embd, r.n_head) == (0.01, 8192, 2, 8, 128, 4)
    assert r.by_hand == ('batch_tokens', 'head_dim', 'matrix_lr', 'warmdown_ratio')
    assert 'set by hand' in [l for l in explain(r).splitlines() if l.startswith('matrix_lr')][0]

@pytest.mark.parametrize('kw, says', [
    (dict(lr=0.1), "no setting 'lr'"), (dict(matrix_rl=0.1), 'did you mean matrix_lr'), (dict(grad_accum=2), "no setting 'grad_accum'"),
    (dict(tokens=1e6, tokens_per_param=3), 'tokens and tokens_per_param'), (dict(tokens=-5), 'tokens must be above 0'),
    (dict(steps=0), 'steps must be a whole number from 1 up'), (dict(batch_tokens=5000), 'use 5120'), (dict(batch_tokens=4096, device_batch=3), 'does not divide'),
    (dict(device_batch=0), 'device_batch must be a whole number from 1 up'), (dict(n_kv_head=3), 'n_kv_head=3 does not divide n_head=4'),
    (dict(n_embd=100), 'must be n_embd'), (dict(warmdown_ratio=1.5), 'between 0 and 1'), (dict(matrix_lr=-1.), 'matrix_lr must be 0 or more'),
    (dict(head_lr=math.nan), 'head_lr must be a finite number, not nan'), (dict(head_lr='abc'), "head_lr must be a finite number, not 'abc'"),
    (dict(tokens=math.inf), 'tokens must be a finite number'), (dict(smear='False'), "smear must be true or false, not 'False'"), (dict(adam_eps=-1), 'adam_eps must be 0 or more'),
    (dict(window_pattern=3), 'window_pattern must be a word'), (dict(adam_betas=(.9,)), 'adam_betas must be two numbers'), (dict(adam_betas=.9), 'adam_betas must be a list of numbers'), (dict(n_head=2.5), 'n_head must be a whole number'), (dict(steps=2.5), 'steps must be a whole')])
def test_impossible_values_get_one_sentence(kw, says):
    with pytest.raises(UserError) as e: recipe(4, 2048, **kw)
    assert says in str(e.value) and '\n' not in str(e.value)

NAMES = [f.name for f in fields(Recipe) if f.name not in ('depth', 'vocab_size', 'max_len')]

@pytest.mark.parametrize('name', [*NAMES, 'tokens_per_param', 'flops'])
def test_any_value_makes_a_recipe_or_a_sentence(name):
    "What --dial can hold: words, numbers, lists, true, {}; a recipe that was made has kept it"
    for value in ('abc', '', -1, 0, 1.5, True, (1, 2), (.5, .5), (), ('a',), {}, math.inf, math.nan, 2**40):
        try: r = recipe(4, 512, 64, **{name: value})
        except UserError as e: assert name in str(e) and '\n' not in str(e)
        else: assert name in ('tokens', 'tokens_per_param', 'flops') or getattr(r, name) == value

def test_matrices_that_stand_still(): assert recipe(4, 512, 64, matrix_lr=0).weight_decay == 1

@pytest.mark.parametrize('args', [(0, 2048), (-1, 2048), (2.5, 2048), (True, 2048), (4, 0), (4, 2048, 0)])
def test_impossible_dials(args):
    with pytest.raises(UserError, match='must be a whole number from 1 up'): recipe(*args)
