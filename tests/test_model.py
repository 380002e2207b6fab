"The model across modules: pieces equal the whole, rows do not meet, gradients are right, nothing leaks from the future"
import copy, math, subprocess, sys
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from nanochat.cache import KVCache
from nanochat.gpt import GPT, GPTConfig, param_roles
from nanochat.head import bits_per_byte, lm_loss, softcap_cross_entropy, token_logprobs

V = 90
EXTRAS = dict(window_pattern='SSL', short_window=3, value_embeds=True, value_gate_channels=4, layer_scales=True, smear=True, smear_channels=5, backout=True)
SHAPES = [dict(n_head=2, n_kv_head=2), dict(n_head=4, n_kv_head=2), dict(n_head=3, n_kv_head=1, head_dim=4), dict(n_layer=3, **EXTRAS)]

def shaken(seed=0, **kw):
    "A small float64 model in which every matrix matters; a new one starts with half of them at zero"
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=V, n_layer=2, n_head=2, n_kv_head=1, head_dim=8, max_len=32), **kw}))
    for p in model.parameters(): torch.nn.init.normal_(p, std=1.5*p.shape[-1]**-0.5)
    return model.double()

def ids_of(*shape): return torch.randint(0, V, shape)

@pytest.mark.parametrize('shape', SHAPES)
def test_future_has_no_influence(shape):
    model, ids = shaken(**shape), ids_of(2, 20)
    other = torch.cat([ids[:, :9], ids_of(2, 11)], 1)
    assert torch.equal(model(ids)[:, :9], model(other)[:, :9])

@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SHAPES), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_pieces_equal_one_shot(shape, sizes):
    model = shaken(**shape)
    ids = ids_of(2, min(sum(sizes), 32))
    cache, start, outs = model.new_cache(2), 0, []
    for n in sizes:
        piece = ids[:, start:start+n]
        if not piece.shape[1]: break
        outs.append(model(piece, cache))
        cache.advance(piece.shape[1])
        start += n
    torch.testing.assert_close(torch.cat(outs, 1), model(ids))

@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SHAPES), st.lists(st.integers(1, 16), min_size=1, max_size=5), st.data())
def test_ragged_rows_equal_rows_alone(shape, lengths, data):
    "Prompts padded on the right, several steps, then rows are dropped, repeated and joined by a new one"
    model, n = shaken(**shape), len(lengths)
    rows = [ids_of(1, 24) for _ in range(n)]                       # the text that each row will follow
    cache = model.new_cache(n, max_len=32)
    model(torch.cat([r[:, :max(lengths)] for r in rows]), cache)
    cache.advance(lengths)
    def step():
        at = list(cache.lengths)
        out = model(torch.cat([r[:, p:p+1] for r, p in zip(rows, at)]), cache)
        for row, p, o in zip(rows, at, out): torch.testing.assert_close(o[0], model(row[:, :p+1])[0, -1])
        cache.advance(1)
    for _ in range(2): step()
    keep = data.draw(st.lists(st.integers(0, n-1), min_size=1, max_size=4))
    new, fresh = ids_of(1, 24), model.new_cache(1, max_len=32)
    model(new[:, :3], fresh)
    fresh.advance(3)
    cache, rows = KVCache.cat([cache.select(keep), fresh]), [rows[i] for i in keep] + [new]
    for _ in range(2): step()

def test_second_piece_of_ragged_prompts():
    model, ids = shaken(), ids_of(3, 20)
    cache = model.new_cache(3)
    model(ids[:, :6], cache)
    cache.advance([2, 6, 4])
    second = torch.stack([ids[b, n:n+5] for b, n in enumerate([2, 6, 4])])
    out = model(second, cache)
    for b, n in enumerate([2, 6, 4]): torch.testing.assert_close(out[b], model(ids[b:b+1])[0, n:n+5])

def test_overflow_raises_and_changes_nothing():
    model, cache = shaken(), shaken().new_cache(2, max_len=8)
    model(ids_of(2, 7), cache)
    cache.advance([5, 7])
    before = [z.clone() for z in cache.k]
    with pytest.raises(ValueError, match='row 1 holds 7 tokens; 2 more do not fit into a cache of max_len=8'): model(ids_of(2, 2), cache)
    assert all(map(torch.equal, before, cache.k)) and cache.lengths == [5, 7]
    model(ids_of(2, 1), cache)
    cache.advance(1)
    assert cache.lengths == [6, 8]

@pytest.mark.parametrize('kind', ['mean', 'sum', 'none'])
def test_loss_and_gradients_equal_autograd(kind):
    model, ids, targets = shaken(), ids_of(3, 20), ids_of(3, 20)
    targets[0, 3:9] = targets[2] = -1
    plain = F.cross_entropy(model.logits(model(ids)).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=kind)
    ours, weights = lm_loss(model, ids, targets, kind), 1.
    if kind == 'none': plain, weights = plain.view(3, 20), torch.randn(3, 20)
    torch.testing.assert_close(ours, plain)
    grads = [torch.autograd.grad((weights*z).sum(), list(model.parameters())) for z in (ours, plain)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b)

@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), chunk=st.integers(1, 50), ignored=st.floats(0, 1), cap=st.sampled_from([0.5, 15., 80.]), v=st.integers(1, 64))
def test_chunks_do_not_matter(n, chunk, ignored, cap, v):
    h, W = torch.randn(n, 6, dtype=torch.float64, requires_grad=True), (9*torch.randn(64, 6, dtype=torch.float64)).requires_grad_()
    y = torch.randint(0, v, (n,)).masked_fill(torch.rand(n) < ignored, -1)
    ours = softcap_cross_entropy(h, W, y, cap, v, 'sum', chunk)
    plain = F.cross_entropy(cap*torch.tanh(h @ W[:v].T/cap), y, ignore_index=-1, reduction='sum')
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (h, W)), torch.autograd.grad(plain, (h, W))): torch.testing.assert_close(a, b)

def test_large_logits_stay_finite_in_float32():
    h, W = torch.full((4, 8), 1e3, requires_grad=True), torch.full((64, 8), 1e3)
    for cap in (15., 80.):
        loss = softcap_cross_entropy(h, W, torch.tensor([0, 1, 2, -1]), cap, 64)
        assert abs(loss.item() - math.log(64)) < 1e-4 and torch.autograd.grad(loss, h)[0].isfinite().all()

def test_accumulated_sums_equal_one_batch():
    "Micro-batches of different weight: sum, then divide once"
    model, ids, targets = shaken(), ids_of(4, 12), ids_of(4, 12)
    targets[0, 2:] = -1
    whole = torch.autograd.grad(lm_loss(model, ids, targets), list(model.parameters()))
    n = (targets >= 0).sum()
    for i in range(4): (lm_loss(model, ids[i:i+1], targets[i:i+1], 'sum')/n).backward()
    for p, g in zip(model.parameters(), whole): torch.testing.assert_close(p.grad, g)

def test_no_gradient_is_made_when_none_is_wanted():
    model, ids = shaken(), ids_of(2, 9)
    with torch.no_grad(): loss = lm_loss(model, ids, ids)
    assert not loss.requires_grad and torch.isclose(loss, lm_loss(model, ids, ids))
    model.lm_head.weight.requires_grad_(False)                     # a frozen head still passes gradients on
    lm_loss(model, ids, ids).backward()
    assert model.lm_head.weight.grad is None and model.wte.weight.grad.any()

def test_bits_per_byte_do_not_depend_on_the_batch():
    model, ids, targets = shaken(), ids_of(6, 15), ids_of(6, 15)
    targets[4, 3:] = -1
    sizes = torch.randint(0, 5, (V,))
    found = [bits_per_byte(model, zip(ids.split(n), targets.split(n)), sizes) for n in (1, 4, 6)]
    assert len({(f['bytes'], f['tokens']) for f in found}) == 1
    for f in found: assert f['bpb'] == pytest.approx(found[0]['bpb'], rel=1e-9)
    logp = token_logprobs(model, ids, targets).detach()
    counted = (targets >= 0) & (sizes[targets] > 0)
    assert found[0]['nats'] == pytest.approx(-logp[counted].sum().item())

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_cast_then_run(dtype):
    model, ids = shaken().float(), ids_of(2, 16)
    full = lm_loss(model, ids, ids)
    low = copy.deepcopy(model).to(dtype)
    loss = lm_loss(low, ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - full)/full < 0.02 and low.wte.weight.grad.dtype == dtype
    assert low.new_cache(1).k[0].dtype == dtype

def test_run_in_inference_mode_first_then_train():
    model, ids = shaken(), ids_of(2, 8)
    with torch.inference_mode(): lm_loss(model, ids, ids)
    lm_loss(model, ids, ids).backward()

def test_meta_model_takes_a_state_dict():
    model, ids = shaken().float(), ids_of(2, 8)
    with torch.device('meta'): empty = GPT(model.cfg)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(ids), model(ids))
    assert empty.num_params() == model.num_params()

def test_config_builds_the_same_model():
    cfg = shaken(softcap=7., qk_gain=1.5, rope_base=500.).cfg
    model = [GPT(c) for c in (cfg, GPTConfig.from_dict(cfg.to_dict())) if torch.manual_seed(5)]
    ids = ids_of(1, 12)
    assert torch.equal(*(m.logits(m(ids)) for m in model))
    for change in (dict(softcap=3.), dict(qk_gain=1.), dict(rope_base=9e9), dict(norm_eps=0.5)):       # each of them matters
        other = shaken(**change)
        assert not torch.allclose(other.logits(other(ids)), (m := shaken()).logits(m(ids)))

def test_state_dict_names_are_plain():
    names = set(shaken(n_layer=1).state_dict())
    assert names == {'wte.weight', 'lm_head.weight', *(f'blocks.0.attn.c_{n}.weight' for n in ('q', 'k', 'v', 'proj')),
                     'blocks.0.mlp.c_fc.weight', 'blocks.0.mlp.c_proj.weight'}
    assert set(param_roles(shaken(n_layer=1))) == names

def test_ids_that_do_not_exist_raise():
    "90 is a padding row of the head, no id"
    for bad in (V, -1):
        with pytest.raises(IndexError): shaken()(torch.tensor([[1, bad]]))

def test_a_model_fits_a_few_rows_and_leaves_the_start():
    torch.manual_seed(0)
    model, ids = GPT(GPTConfig(vocab_size=V, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, max_len=16)), ids_of(4, 17)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(60):
        loss = lm_loss(model, ids[:, :-1], ids[:, 1:])
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(V)) < 0.01 and losses[-1] < 0.1

def test_import_is_light():
    code = 'import sys, nanochat.head, nanochat.gpt; print([m for m in ("matplotlib", "IPython", "torch._inductor.compile_fx") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
