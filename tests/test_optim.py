"The optimizer across modules: on a real model, saved to real files, resumed to the bit"
import copy, math
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.head import lm_loss
from nanochat.optim import MuonAdamW, make_optimizer, polar_coefficients, polar_express
from nanochat.scaling import gpt_config, recipe

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Small tensors: threads that wait for each other cost more than they give"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

OFF = dict.fromkeys(('value_embeds', 'layer_scales', 'smear', 'backout'), False)          # matrices, embedding and head are left
R, R_ALL = recipe(2, 256, 64, steps=50, batch_tokens=256, **OFF), recipe(2, 256, 64, steps=50, batch_tokens=256)

def fresh(seed=0, r=R):
    torch.manual_seed(seed)
    model = GPT(gpt_config(r))
    return model, make_optimizer(model, r)

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
    theirs = torch.optim.AdamW(twin.parameters(), **hyper)
    for seed in range(20):
        backward(model, seed)
        for p, q in zip(model.parameters(), twin.parameters()): q.grad = p.grad.clone()
        assert ours.step(); theirs.step()
    for p, q in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

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

def test_stacked_equals_one_by_one():
    (a, stacked), (b, _) = fresh(), fresh()
    single = [MuonAdamW([dict(params=[(n, p)], kind='muon', lr=R.matrix_lr, weight_decay=R.weight_decay)])
              for n, p in b.named_parameters() if 'blocks' in n]
    for seed in range(3):
        backward(a, seed)
        for p, q in zip(a.parameters(), b.parameters()): q.grad = p.grad.clone()
        assert stacked.step() and all(o.step() for o in single)
    for (n, p), (_, q) in zip(a.named_parameters(), b.named_parameters()):
        if 'blocks' in n: torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_changes_nothing(bad):
    model, opt = fresh()
    go_on(model, opt, [0, 1])
    for name, p in model.named_parameters():
        before = [q.detach().clone() for q in model.parameters()] + [t.clone() for t in opt.tensors().values()]
        backward(model, 5)
        p.grad.view(-1)[-1] = bad
        assert opt.step() is False and not math.isfinite(opt.grad_norm), name
        assert equal(before, [*model.parameters(), *opt.tensors().values()]), name
    backward(model, 6)
    assert opt.step() is True and opt.skipped == len(list(model.parameters()))

def test_parameters_without_gradient_stay():
    model, opt = fresh()
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

def test_state_through_a_file_continues_to_the_bit(tmp_path):
    model, opt = fresh()
    go_on(model, opt, range(4))
    save_file(opt.tensors(), tmp_path/'o.safetensors')
    weights = copy.deepcopy(model.state_dict())
    straight = go_on(model, opt, range(4, 8))
    again, opt2 = fresh(seed=9)
    go_on(again, opt2, range(50, 53))
    again.load_state_dict(weights); opt2.load_tensors(load_file(tmp_path/'o.safetensors'))
    assert equal(straight, go_on(again, opt2, range(4, 8)))

def test_torchs_own_state_dict_continues_to_the_bit():
    model, opt = fresh()
    go_on(model, opt, range(3))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    straight = go_on(model, opt, range(3, 6))
    again, opt2 = fresh(seed=9)
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
