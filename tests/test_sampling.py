"Choosing a token: against transformers and scipy, and each row as if it were alone"
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from nanochat.common import UserError
from nanochat.sampling import Sampling, adjusted, dials, measure, next_probs, sample

V = 40
def logits_of(seed, rows=1, spread=3., dtype=torch.float32):
    return spread*torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

SETTINGS = st.builds(Sampling, temperature=st.sampled_from([0., .3, .8, 1., 2.5]), top_k=st.sampled_from([0, 1, 3, 17, 100]),
    top_p=st.sampled_from([.05, .5, .9, 1.]), min_p=st.sampled_from([0., .01, .3, 1.]), repetition_penalty=st.sampled_from([1., 1.3, .7]),
    bias=st.none() | st.dictionaries(st.integers(0, V-1), st.floats(-5, 5), max_size=4))

# ---- others

def theirs(logits, seen, s):
    "What transformers makes of the same settings, in its order"
    lp = pytest.importorskip('transformers.generation.logits_process')
    steps = lp.LogitsProcessorList()
    if s.bias: steps.append(lp.SequenceBiasLogitsProcessor([[[i], float(b)] for i, b in s.bias.items()]))
    if s.repetition_penalty != 1: steps.append(lp.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.temperature not in (0, 1): steps.append(lp.TemperatureLogitsWarper(s.temperature))
    if s.temperature and s.top_k: steps.append(lp.TopKLogitsWarper(s.top_k))
    if s.temperature and s.top_p < 1: steps.append(lp.TopPLogitsWarper(s.top_p))
    if s.temperature and s.min_p: steps.append(lp.MinPLogitsWarper(s.min_p))
    return steps(torch.tensor([seen]), logits.clone())

@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), SETTINGS, st.lists(st.integers(0, V-1), min_size=1, max_size=8))
def test_the_distribution_is_that_of_transformers(seed, s, seen):
    logits, mask = logits_of(seed), torch.zeros(1, V, dtype=torch.bool)
    mask[0, seen] = True
    scores, ours = theirs(logits, seen, s), next_probs(logits, s, mask)
    if s.temperature == 0: assert ours.argmax() == scores.argmax() and ours.max() == 1
    else: torch.testing.assert_close(ours, scores.softmax(-1), rtol=1e-4, atol=1e-6)

def test_draws_have_the_right_frequencies():
    stats = pytest.importorskip('scipy.stats')
    s, n = Sampling(temperature=1.3, top_k=12, top_p=.95, min_p=.02), 40_000
    logits = logits_of(1, spread=1.5)
    ids = sample(logits.expand(n, -1), s, torch.rand(n, generator=torch.Generator().manual_seed(0)))
    p, counts = next_probs(logits, s)[0].double(), ids.bincount(minlength=V)
    kept = p > 0
    assert counts[~kept].sum() == 0 and 3 < kept.sum() <= 12
    assert stats.chisquare(counts[kept], (p[kept]/p[kept].sum()*n)).pvalue > 1e-4

def test_entropy_is_that_of_scipy():
    stats = pytest.importorskip('scipy.stats')
    logits = logits_of(2, rows=5, dtype=torch.float64)
    m = measure(logits, torch.arange(5), 3)
    for row, id, lp, h, ids, top in zip(logits, range(5), *m):
        p = row.softmax(-1)
        assert h.item() == pytest.approx(stats.entropy(p)) and lp.item() == pytest.approx(math.log(p[id]))
        assert ids.tolist() == p.argsort(descending=True)[:3].tolist() and torch.allclose(top.exp(), p[ids])

# ---- rows of a batch

@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.lists(SETTINGS, min_size=1, max_size=6))
def test_rows_do_not_see_each_other(seed, rows):
    "Bit for bit: whatever the neighbours ask for"
    logits, u = logits_of(seed, len(rows)), torch.rand(len(rows), generator=torch.Generator().manual_seed(seed))
    seen = torch.rand(len(rows), V, generator=torch.Generator().manual_seed(seed)) < .2
    together, drawn = next_probs(logits, rows, seen), sample(logits, rows, u, seen)
    for i, s in enumerate(rows):
        assert torch.equal(together[i], next_probs(logits[i:i+1], s, seen[i:i+1])[0])
        assert drawn[i] == sample(logits[i:i+1], s, u[i:i+1], seen[i:i+1])[0] and together[i, drawn[i]] > 0

def test_the_same_dials_serve_many_steps():
    rows = [Sampling(temperature=1., top_k=5), Sampling(), Sampling(temperature=.5, bias={3: 100.})]
    d = dials(rows, V)
    for seed in range(5): assert torch.equal(next_probs(logits_of(seed, 3), d), next_probs(logits_of(seed, 3), rows))
    assert next_probs(logits_of(9, 3), d)[2].argmax() == 3

def test_greedy_obeys_bias_and_penalty():
    logits = torch.tensor([[3., 2., -1., -2.]])
    assert sample(logits, Sampling(), torch.zeros(1)) == 0
    assert sample(logits, Sampling(bias={1: 1.5}), torch.zeros(1)) == 1
    assert sample(logits, Sampling(bias={0: -math.inf}), torch.zeros(1)) == 1
    assert sample(logits, Sampling(repetition_penalty=2.), torch.zeros(1), torch.tensor([[True, False, False, False]])) == 1
    seen = torch.tensor([[True, False, True, False]])
    assert adjusted(logits, dials(Sampling(repetition_penalty=2.), 4), seen).tolist() == [[1.5, 2., -2., -2.]]    # away from zero, both ways

@pytest.mark.parametrize('s', [dict(temperature=1e-30), dict(temperature=1e30), dict(temperature=1., top_p=1e-9), dict(temperature=1., min_p=1.)], ids=str)
def test_extremes(s):
    p = next_probs(logits_of(3, 4, spread=40.), Sampling(**s))
    assert p.isfinite().all() and torch.allclose(p.sum(-1), torch.ones(4))
    if s['temperature'] < 1e9: assert (p.max(-1).values == 1).all()

def test_an_edge_that_rises_where_nothing_is(monkeypatch):
    "A GPU adds in another order, and its sums need not rise evenly: what has probability 0 is not drawn even then"
    add, logits = torch.Tensor.cumsum, torch.tensor([[0., -math.inf, 0., -math.inf]]).expand(200, -1)
    def uneven(x, dim): return add(x, dim) + torch.tensor([0., 1e-2, 0., 1e-2])
    monkeypatch.setattr(torch.Tensor, 'cumsum', uneven)
    assert set(sample(logits, Sampling(temperature=1.), torch.linspace(0, 1 - 2**-24, 200)).tolist()) == {0, 2}

def test_a_row_of_nan_still_gives_an_id():
    "The caller sees the NaN; until then nothing may reach beyond the vocabulary"
    logits = torch.stack([logits_of(0)[0], torch.full((V,), math.nan)])
    ids = sample(logits, Sampling(temperature=1., top_k=5), torch.tensor([.5, .5]))
    assert all(0 <= i < V for i in ids.tolist())

# ---- bad values

BAD = dict(temperature=['1', None, -1, math.nan, math.inf], top_k=[-1, 2.5, None], top_p=[0, 1.1, math.nan, None], min_p=[-.1, 2], seed=['x', 1.5],
           repetition_penalty=[0, -1, math.inf, math.nan], max_tokens=[0, 1.5, 'many'], stop=[[''], [1], None, 5],
           bias=[{-1: 1.}, {'a': 1.}, {1: math.inf}, {1: math.nan}, [1], 5],
           logprobs=[-1, 'all'], forced=[[-1], 'text', None, 5])

@pytest.mark.parametrize('name', list(BAD))
def test_bad_values_are_refused(name):
    for value in BAD[name]:
        with pytest.raises(UserError, match=f'{name} is .*it must be'): Sampling(**{name: value})
