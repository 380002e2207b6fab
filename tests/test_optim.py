"The optimizer across modules: on a real model, saved to real files, resumed to the bit"
import copy, dataclasses, json, math, os, runpy, subprocess, sys
from types import SimpleNamespace
import numpy as np, pytest, torch
from conftest import ROOT
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.head import lm_loss
from nanochat.optim import (MUON_OPTIONS, MuonAdamW, cautious_decay, clip_scale, even_neurons, even_rows, make_optimizer, muon_step, muon_update,
                            neuron_shape, polar_coefficients, polar_express)
from nanochat.scaling import gpt_config, recipe, set_schedule
from nanochat.sharded import ShardedMuonAdamW

pytestmark = pytest.mark.usefixtures('one_thread')

OFF = dict.fromkeys(('value_embeds', 'layer_scales', 'smear', 'backout'), False)          # matrices, embedding and head are left
R, R_ALL = recipe(2, 256, 64, steps=50, batch_tokens=256, **OFF), recipe(2, 256, 64, steps=50, batch_tokens=256)

def fresh(seed=0, r=R, **options):
    torch.manual_seed(seed)
    model = GPT(gpt_config(r))
    return model, make_optimizer(model, SimpleNamespace(**{**dataclasses.asdict(r), **options}))

BOTH = dict(equilibrate=True, neuron_beta=.9)
OPTIONS = [{}, dict(equilibrate=True), dict(neuron_beta=.9), BOTH, dict(cautious=False), dict(clip_norm=.01)]

def backward(model, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (2, 33), generator=g)
    loss = lm_loss(model, ids[:, :-1], ids[:, 1:])
    model.zero_grad(); loss.backward()
    return loss.item()

def go_on(model, opt, seeds):
    for s in seeds: backward(model, s); assert opt.step()
    return [p.detach().clone() for p in model.parameters()]

def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (7, 7), (30, 20), (20, 30), (3, 16, 48), (2, 3, 5, 4)])
def test_polar_express_against_svd(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert (polar_express(G, 10) - U @ Vh).abs().max() < 1e-4
    assert polar_express(G).shape == G.shape and polar_express(G).dtype == G.dtype
    s = torch.linalg.svdvals(polar_express(G))
    assert 0.8 < s.min() and s.max() < 1.2

@pytest.mark.parametrize('scale', [1e-38, 1e-30, 1e-12, 1., 1e12, 1e36])
def test_polar_express_ignores_scale(scale):
    G = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    assert (polar_express(G * scale) - polar_express(G)).abs().max() < 1e-3
    assert polar_express(torch.zeros(3, 4)).abs().max() == 0 and polar_express(torch.full((3, 4), 1e-44)).isfinite().all()

@pytest.mark.parametrize('steps', range(1, 9))
def test_coefficients_never_leave_the_interval(steps):
    x = np.logspace(-3, 0, 2000) / 1.01
    for a, b, c in polar_coefficients(steps):
        x = a * x + b * x**3 + c * x**5
        assert 0 < x.min() and x.max() < 2
    assert np.abs(x - 1).max() < {5: 0.16, 6: 0.02, 7: 1e-3, 8: 1e-3}.get(steps, 1.)

def test_more_steps_are_never_worse():
    G = torch.randn(20, 20, generator=torch.Generator().manual_seed(2))
    far = [(torch.linalg.svdvals(polar_express(G, n)) - 1).abs().max().item() for n in (3, 5, 7, 9)]
    assert far == sorted(far, reverse=True)

def test_adamw_is_torchs_on_a_model():
    "20 steps on the same gradients, every role as AdamW"
    model, _ = fresh()
    twin = copy.deepcopy(model)
    hyper = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    ours = MuonAdamW([dict(params=list(model.named_parameters()), kind='adamw', **hyper)])
    theirs = torch.optim.AdamW(twin.parameters(), foreach=False, **hyper)
    for seed in range(20):
        backward(model, seed)
        for p, q in zip(model.parameters(), twin.parameters()): q.grad = p.grad.clone()
        assert ours.step(); theirs.step()
    for p, q in zip(model.parameters(), twin.parameters()): assert torch.equal(p, q)                      # the same operations in the same order

def test_every_parameter_is_in_one_group_by_role():
    model, opt = fresh(r=R_ALL)
    groups = {g['role']: g for g in opt.param_groups}
    assert {r: g['kind'] for r, g in groups.items()} == {'embedding': 'adamw', 'head': 'adamw', 'matrix': 'muon', 'scalar': 'adamw'}
    assert all(p.ndim == 2 for p in groups['matrix']['params'])
    assert {n for n in groups['scalar']['param_names']} == {'stream_scales', 'x0_scales', 'smear_scale', 'backout_scale', 'smear_gate.weight',
                                                            'blocks.1.attn.value_gate.weight'}
    names = [n for g in opt.param_groups for n in g['param_names']]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert all(g['initial_lr'] == g['lr'] == getattr(R, f'{r}_lr') for r, g in groups.items())

@pytest.mark.parametrize('options', OPTIONS[:5], ids=str)
def test_stacked_equals_one_by_one(options):
    (a, stacked), (b, _) = fresh(**options), fresh()
    single = [MuonAdamW([dict(params=[(n, p)], kind='muon', lr=R.matrix_lr, weight_decay=R.weight_decay, **options)])
              for n, p in b.named_parameters() if 'blocks' in n]
    for seed in range(3):
        backward(a, seed)
        for p, q in zip(a.parameters(), b.parameters()): q.grad = p.grad.clone()
        assert stacked.step() and all(o.step() for o in single)
    for (n, p), (_, q) in zip(a.named_parameters(), b.named_parameters()):
        if 'blocks' in n: torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_changes_nothing(bad):
    model, opt = fresh(clip_norm=.01, **BOTH)
    go_on(model, opt, [0, 1])
    for name, p in model.named_parameters():
        before = [q.detach().clone() for q in model.parameters()] + [t.clone() for t in opt.tensors().values()]
        backward(model, 5)
        p.grad.view(-1)[-1] = bad
        assert opt.step() is False and not math.isfinite(opt.grad_norm), name
        assert equal(before, [*model.parameters(), *opt.tensors().values()]), name
    backward(model, 6)
    assert opt.step() is True and opt.skipped == len(list(model.parameters()))

@pytest.mark.parametrize('options', [{}, BOTH], ids=str)
def test_parameters_without_gradient_stay(options):
    model, opt = fresh(**options)
    go_on(model, opt, [0])
    before, state = [p.detach().clone() for p in model.parameters()], {k: v.clone() for k, v in opt.tensors().items()}
    backward(model, 1)
    frozen = [n for n, _ in model.named_parameters() if 'blocks.0' in n or 'wte' in n]
    for n, p in model.named_parameters():
        if n in frozen: p.grad = None
    assert opt.step()
    for (n, p), old in zip(model.named_parameters(), before): assert torch.equal(p, old) == (n in frozen), n
    for key, t in opt.tensors().items(): assert torch.equal(t, state[key]) == (key.rsplit('.', 1)[0] in frozen), key
    model.zero_grad()
    assert opt.step() is True and opt.grad_norm == 0

@pytest.mark.parametrize('options', [{}, {**BOTH, 'cautious': False, 'clip_norm': .01}], ids=str)
def test_state_through_a_file_continues_to_the_bit(tmp_path, options):
    model, opt = fresh(**options)
    go_on(model, opt, range(4))
    save_file(opt.tensors(), tmp_path/'o.safetensors')
    weights = copy.deepcopy(model.state_dict())
    straight = go_on(model, opt, range(4, 8))
    again, opt2 = fresh(seed=9, **options)
    go_on(again, opt2, range(50, 53))
    again.load_state_dict(weights); opt2.load_tensors(load_file(tmp_path/'o.safetensors'))
    assert equal(straight, go_on(again, opt2, range(4, 8)))

@pytest.mark.parametrize('options', [{}, BOTH], ids=str)
def test_torchs_own_state_dict_continues_to_the_bit(options):
    model, opt = fresh(**options)
    go_on(model, opt, range(3))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    straight = go_on(model, opt, range(3, 6))
    again, opt2 = fresh(seed=9, **options)
    again.load_state_dict(weights); opt2.load_state_dict(state)
    assert equal(straight, go_on(again, opt2, range(3, 6)))
    for g in opt2.param_groups: g['lr'] = 0.
    assert equal(straight, go_on(again, opt2, [9]))            # the groups that were loaded are those that are obeyed

def test_a_resumed_run_obeys_its_new_flags():
    half = recipe(2, 256, 64, steps=50, batch_tokens=256, matrix_lr=R.matrix_lr / 2, weight_decay=R.weight_decay, **OFF)
    model, opt = fresh()
    go_on(model, opt, [0])
    again, opt2 = fresh(r=half)
    again.load_state_dict(model.state_dict()); opt2.load_tensors(copy.deepcopy(opt.tensors()))
    start = model.blocks[0].mlp.c_fc.weight.detach().clone()
    moved = [m.blocks[0].mlp.c_fc.weight - start for m, o in ((model, opt), (again, opt2)) if go_on(m, o, [1])]
    torch.testing.assert_close(moved[0], 2 * moved[1], rtol=1e-3, atol=1e-6)

def test_tensors_of_another_model_are_refused():
    _, opt = fresh()
    other = make_optimizer(GPT(GPTConfig(vocab_size=256, n_layer=3, n_head=2, n_kv_head=2, max_len=64)), R)
    with pytest.raises(UserError, match=r'blocks\.2\..*missing|unknown'): opt.load_tensors(other.tensors())
    wide = make_optimizer(GPT(GPTConfig(vocab_size=256, n_layer=2, n_head=3, n_kv_head=3, max_len=64)), R)
    with pytest.raises(UserError, match='has shape'): opt.load_tensors(wide.tensors())

def test_it_trains():
    "A real model learns one batch by heart"
    model, opt = fresh()
    first = backward(model, 3)
    for _ in range(25): assert opt.step(); last = backward(model, 3)
    assert first == pytest.approx(math.log(256), abs=0.05) and last < 1.

def test_refusals():
    p = torch.nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match='pairs'): MuonAdamW([dict(params=[p], kind='muon')])
    with pytest.raises(ValueError, match="'lion'"): MuonAdamW([dict(params=[('p', p)], kind='lion')])
    with pytest.raises(ValueError, match='matrices only'): MuonAdamW([dict(params=[('p', torch.nn.Parameter(torch.ones(3)))], kind='muon')])
    with pytest.raises(ValueError, match='clip must be 0'): MuonAdamW([dict(params=[('p', p)])], clip=-1.)
    with pytest.raises(ValueError, match='clip must be 0'): MuonAdamW([dict(params=[('p', p)])], clip=math.nan)
    with pytest.raises(ValueError, match='neuron_beta must be'): MuonAdamW([dict(params=[('p', p)], kind='muon', neuron_beta=1.)])

# ---- the additions to Muon, and clipping

def test_without_options_it_is_the_muon_of_before():
    "Defaults: the arithmetic that checkpoints of older versions were made with, to the bit"
    _, opt = fresh()
    group = next(g for g in opt.param_groups if g['kind'] == 'muon')
    assert {k: group[k] for k in MUON_OPTIONS} == dict(equilibrate=False, neuron_beta=0., cautious=True) and opt.clip == 0
    g = torch.Generator().manual_seed(0)
    W, mean, mine = torch.randn(3, 8, 6, generator=g), torch.zeros(3, 8, 6), torch.zeros(3, 8, 6)
    old = W.clone()
    for _ in range(4):
        grad = torch.randn(3, 8, 6, generator=g)
        mean.lerp_(grad, 1 - .95)
        update = polar_express(grad.lerp(mean, .95)) * max(1, 8 / 6)**.5
        old -= .02 * (update + .1 * cautious_decay(old, update))
        muon_step(W, grad, dict(momentum=mine), dict(lr=.02, weight_decay=.1, momentum=.95, **MUON_OPTIONS))
    assert torch.equal(W, old) and torch.equal(mean, mine)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))

@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 99), st.floats(-25, 25))
def test_rows_evened_before(shape, seed, exponent):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(shape, generator=g)
    X[0, 0] = 0.
    scales = torch.ones(shape[0], shape[1], 1)
    scales[:, -1] = 10.**exponent
    out = even_rows(X * scales)
    assert out.isfinite().all() and (out[0, 0] == 0).all()
    torch.testing.assert_close(out, even_rows(X), rtol=1e-3, atol=1e-5)                    # the size of a row does not matter
    lengths = out.norm(dim=-1)
    assert ((lengths - 1).abs() < 1e-5).logical_or(lengths == 0).all()

@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 99), st.integers(1, 5))
def test_neurons_evened_after(shape, seed, steps):
    g = torch.Generator().manual_seed(seed)
    K, m, n = shape
    sq, turned, alone = (torch.zeros(K, *neuron_shape(m, n)) for _ in range(3))
    turned = turned.mT.contiguous()
    dead = seed % m if m >= n else None
    for _ in range(steps):
        O = torch.randn(shape, generator=g)
        if dead is not None: O[:, dead] = 0.
        out = even_neurons(O, sq, .9)
        assert out.isfinite().all()
        torch.testing.assert_close(out.norm(dim=(1, 2)), O.norm(dim=(1, 2)), rtol=1e-4, atol=1e-6)       # as long as before
        if dead is not None: assert (out[:, dead] == 0).all()
        if m != n: torch.testing.assert_close(even_neurons(O.mT, turned, .9).mT, out, rtol=1e-4, atol=1e-6)   # the neuron is the longer side
        for i in range(K): torch.testing.assert_close(even_neurons(O[i:i+1], alone[i:i+1], .9)[0], out[i], rtol=1e-4, atol=1e-6)
    assert (sq >= 0).all()

def test_what_each_addition_changes():
    "Rows evened before: the result no longer depends on the size of a row. Neurons evened after: rows of a tall update become alike"
    g = torch.Generator().manual_seed(0)
    grad, sizes = torch.randn(1, 40, 10, generator=g), torch.logspace(0, -2, 40)[None, :, None]
    fresh_mean = lambda: torch.zeros(1, 40, 10)
    plain = [muon_update(x, fresh_mean()) for x in (grad, grad * sizes)]
    rows = [muon_update(x, fresh_mean(), equilibrate=True) for x in (grad, grad * sizes)]
    assert (plain[0] - plain[1]).norm() > .5 * plain[0].norm() and (rows[0] - rows[1]).norm() < 1e-3 * rows[0].norm()
    uneven = lambda u: (u.norm(dim=-1).std() / u.norm(dim=-1).mean()).item()
    even = muon_update(grad * sizes, fresh_mean(), neuron_sq=torch.zeros(1, 40, 1))
    assert uneven(plain[1]) > .3 and uneven(even) < 1e-3

def test_state_of_an_option_migrates():
    "A checkpoint from before the option, or made without it, starts it afresh; one made with it is read without it"
    plain, (model, opt) = fresh()[1], fresh(**BOTH)
    go_on(model, opt, [0, 1])
    late = {k for k in opt.tensors() if k.endswith('.neuron_sq')}
    assert late and opt.tensors().keys() - late == plain.tensors().keys()
    assert all(t.shape in [(p.shape[0], 1), (1, p.shape[1])] for n, p in model.named_parameters() for k, t in opt.tensors().items() if k == n + '.neuron_sq')
    opt.load_tensors({k: v.clone() for k, v in opt.tensors().items() if k not in late})
    assert all(not opt.tensors()[k].any() for k in late)
    assert go_on(model, opt, [2]) and all(opt.tensors()[k].any() for k in late)
    plain.load_tensors(opt.tensors())
    assert all(torch.equal(t, opt.tensors()[k]) for k, t in plain.tensors().items())
    wrong = {**opt.tensors(), sorted(late)[0]: torch.zeros(3, 3)}
    with pytest.raises(UserError, match='neuron_sq has shape'): opt.load_tensors(wrong)

def test_the_sharded_optimizer_migrates_too():
    "One process alone needs no group to load"
    new = lambda: torch.nn.Parameter(torch.zeros(6, 4))
    one = MuonAdamW([dict(params=[('a', new()), ('b', new())], kind='muon', neuron_beta=.9)])
    for p in one.param_groups[0]['params']: p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    one.step()
    many = ShardedMuonAdamW([dict(params=[('a', new()), ('b', new())], kind='muon', neuron_beta=.9)], clip=.5)
    many.load_tensors(one.tensors())
    (part,) = many.parts
    assert torch.equal(part.state['neuron_sq'][1], one.tensors()['b.neuron_sq']) and many.clip == .5
    many.load_tensors({k: v for k, v in one.tensors().items() if 'momentum' in k})
    assert not part.state['neuron_sq'].any() and torch.equal(part.state['momentum'][0], one.tensors()['a.momentum'])
    ShardedMuonAdamW([dict(params=[('a', new()), ('b', new())], kind='muon')]).load_tensors(one.tensors())
    with pytest.raises(UserError, match='a.neuron_sq does not fit'): many.load_tensors({**one.tensors(), 'a.neuron_sq': torch.zeros(1, 4)})

def test_clipping_is_torchs():
    (a, ours), (b, theirs) = fresh(clip_norm=.01), fresh()
    for seed in range(3):
        backward(a, seed)
        for p, q in zip(a.parameters(), b.parameters()): q.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(b.parameters(), .01)
        assert ours.step() and theirs.step()
        assert norm > .02 and ours.grad_norm == pytest.approx(norm.item(), rel=1e-6) and theirs.grad_norm < .0101     # recorded before clipping
    moved = sum((p - q).square().sum() for p, q in zip(a.parameters(), b.parameters())).sqrt()
    assert moved < 1e-3 * sum(p.square().sum() for p in a.parameters()).sqrt()      # AdamW turns a rounding error near zero into a step

def test_clipping_that_does_not_bite_changes_nothing():
    (a, clipped), (b, plain) = fresh(clip_norm=1e6), fresh()
    assert equal(go_on(a, clipped, range(3)), go_on(b, plain, range(3)))
    assert clip_scale(5., 0.) == 1 and clip_scale(0., 1.) == 1 and clip_scale(5., 1.) == pytest.approx(.2)

def test_muon_does_not_feel_the_scale_of_all_gradients():
    "Clipping every step by the same factor is no change for the matrices; only a spike among others is"
    (a, opt), (b, scaled) = fresh(), fresh()
    for seed in range(3):
        backward(a, seed)
        for p, q in zip(a.parameters(), b.parameters()): q.grad = p.grad / 64
        assert opt.step() and scaled.step()
    for (n, p), q in zip(a.named_parameters(), b.parameters()):
        if 'blocks' in n: torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_it_trains_with_each_option(options):
    model, opt = fresh(**options)
    first = backward(model, 3)
    for _ in range(15): assert opt.step(); last = backward(model, 3)
    assert last < .7 * first

def test_nothing_is_compiled():
    "No compiler on this machine: the optimizer is imported and steps, and import loads no part of the compiler"
    code = ("import sys; import nanochat.optim as o; early = 'torch._inductor' in sys.modules; import torch\n"
            "p = torch.nn.Parameter(torch.ones(4, 3)); opt = o.MuonAdamW([dict(params=[('p', p)], kind='muon', neuron_beta=.9, equilibrate=True)])\n"
            "p.grad = torch.ones(4, 3); assert opt.step()\n"
            "from torch._dynamo.utils import counters; print(early, sum(map(len, counters.values())))")
    env = {**os.environ, 'PATH': '', 'CXX': '/nowhere/g++', 'CC': '/nowhere/cc'}
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert r.returncode == 0 and r.stdout.split() == ['False', '0'], r.stdout + r.stderr

# ---- the stored runs behind the page

def test_stored_runs_are_those_of_the_tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    tool, file = runpy.run_path(str(ROOT/'tools/ablate_optim.py')), json.loads((ROOT/'nbs/ablations_optim.json').read_text(encoding='utf-8'))
    assert file['settings']['variants'] == json.loads(json.dumps(tool['VARIANTS']))
    assert sorted((r['name'], r['seed']) for r in file['runs']) == sorted((name, seed) for name in tool['VARIANTS'] for seed in range(3))
    assert all(math.isfinite(r['bpb']) and r['bpb'] > 0 for r in file['runs'])
    assert file['text'] == json.loads((ROOT/'nbs/ablations.json').read_text(encoding='utf-8'))['text']

def test_the_tool_changes_what_it_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    tool = runpy.run_path(str(ROOT/'tools/ablate_optim.py'))
    for name, change in tool['VARIANTS'].items():
        model, opt = fresh(r=R_ALL)
        new = tool['changed'](opt, change)
        old, now = ({g['role']: g for g in o.param_groups} for o in (opt, new))
        for role, group in now.items():
            assert [id(p) for p in group['params']] == [id(p) for p in old[role]['params']]
            differ = {k for k in group if k in old[role] and k not in ('params', 'param_names', 'initial_lr', 'initial_weight_decay') and group[k] != old[role][k]}
            assert differ == (set(change.get('group', {})) if role == 'matrix' else set()), (name, role)
        set_schedule(new, R_ALL, R_ALL.steps // 3)
        assert new.clip == change.get('clip', 0.) and now['matrix']['lr'] == change.get('group', {}).get('lr', R_ALL.matrix_lr)
