"Scaling laws: known constants come back, an outside optimizer finds nothing better, series that do not belong together are refused, and the stored series is that of its commands"
import json, re, shlex
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT
from nanochat.common import UserError, write_json
from nanochat.laws import Law, _cost, _log_loss, fit_law, fit_series, grid, series, valleys
from nanochat.scaling import dial_settings, recipe
from nanochat.scripts.laws import _numbers

N, C = (x.ravel() for x in np.meshgrid(np.geomspace(2e7, 5e9, 6), np.geomspace(1e18, 1e21, 5)))
D = C/(6*N)

@settings(max_examples=8, deadline=None)
@given(st.floats(.5, 2), st.floats(.2, .6), st.floats(.2, .6), st.floats(.1, 2), st.floats(.1, 2))
def test_known_constants_come_back(E, alpha, beta, too_small, too_short):
    "A and B so that both terms weigh something in the middle of the grid; otherwise no runs could tell them"
    law = Law(E, too_small*np.median(N)**alpha, too_short*np.median(D)**beta, alpha, beta)
    found = fit_law(N, D, law.loss(N, D), draws=1)
    assert found.error < 1e-6 and np.allclose(found.law, law, rtol=1e-2)

def test_an_outside_optimizer_finds_nothing_better():
    from scipy.optimize import minimize
    law = Law(1.69, 406.4, 410.7, .34, .28)
    L = law.loss(N, D)*np.exp(.01*np.random.default_rng(0).standard_normal(len(N)))
    cost = lambda t: float(_cost(_log_loss(t, N, D)[0] - np.log(L), np.ones(len(L)), 1e-3))
    ours = fit_law(N, D, L, draws=1).law
    start = np.array([*np.log(law[:3]), *law[3:]])
    theirs = min(minimize(cost, start*(1 + .1*np.random.default_rng(i).standard_normal(5)), method='Nelder-Mead', options=dict(maxiter=6000, maxfev=6000)).fun for i in range(4))
    assert cost([*np.log(ours[:3]), *ours[3:]]) <= theirs*(1 + 1e-6)

def test_one_bad_run_does_not_rule_the_fit():
    law = Law(1.69, 406.4, 410.7, .34, .28)
    L = law.loss(N, D)
    L[7] *= 1.3
    assert np.allclose(fit_law(N, D, L, draws=1).law[3:], law[3:], atol=.01)

def test_the_interval_holds_the_truth_most_of_the_time():
    law, held = Law(1.69, 406.4, 410.7, .34, .28), 0
    for seed in range(8):
        noise = np.exp(.01*np.random.default_rng(seed).standard_normal(len(N)))
        _, low, high = fit_law(N, D, law.loss(N, D)*noise, draws=40, seed=seed).interval(lambda x: x.optimum(1e22)[0])
        held += low <= law.optimum(1e22)[0] <= high
    assert 5 <= held                                                       # nine in ten would be seven; a bootstrap of thirty runs is a little too sure

def test_a_known_floor_stays():
    law = Law(1.69, 406.4, 410.7, .34, .28)
    fit = fit_law(N, D, law.loss(N, D), E=1.5, draws=5)
    assert fit.law.E == pytest.approx(1.5) and all(o.E == pytest.approx(1.5) for o in fit.others)

@pytest.mark.parametrize('change, words', [(dict(L=0), 'above 0 and finite'), (dict(L=float('nan')), 'above 0 and finite'), (dict(n=5), '5 runs with')],
                         ids=['zero', 'nan', 'few'])
def test_impossible_runs_are_refused(change, words):
    n = change.get('n', len(N))
    L = np.full(n, 2.)
    L[0] = change.get('L', 2.)
    with pytest.raises(UserError, match=words): fit_law(N[:n], D[:n], L)

# ------------------------------------------------------------------------------------------------ series
def finished(base, tag, depth, **config):
    r = recipe(depth, 512, 64, steps=40)
    write_json(base/'base'/tag/'config.json', dict(dict(recipe=r.to_dict(), data='made', data_sha256='a', tokenizer='b', eval_tokens=1), **config))
    write_json(base/'base'/tag/'result.json', dict(tokens=r.tokens, val_loss=2., val_bpb=1., seconds=1., marks={}, environment={}))

def test_series_takes_what_is_finished_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path))
    finished(tmp_path, 's-d2', 2); finished(tmp_path, 's-d1', 1); finished(tmp_path, 'sx-d1', 1)
    write_json(tmp_path/'base/s-d3/config.json', {})                       # still at work
    got = series('s')
    assert [m['tag'] for m in got['runs']] == ['s-d1', 's-d2'] and valleys(got) == []

@pytest.mark.parametrize('key', ['data_sha256', 'tokenizer', 'eval_tokens'])
def test_runs_that_cannot_be_compared_are_refused(key, tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path))
    finished(tmp_path, 's-d1', 1); finished(tmp_path, 's-d2', 2, **{key: 'other'})
    with pytest.raises(UserError, match=f'differ in {key}'): series('s')

def test_the_stored_series_is_that_of_its_commands():
    page = json.loads((ROOT/'nbs/80_scaling_laws.ipynb').read_text(encoding='utf-8'))
    text = next(''.join(c['source']) for c in page['cells'] if c['id'] == 'words').replace('\\\n', ' ')
    words = shlex.split(re.search(r'bash (runs/scaling_laws.sh .*)', text)[1])
    flag = dict(zip(words[1::2], words[2::2]))
    runs = grid(_numbers('--depths', flag['--depths'], int), _numbers('--flops', flag['--flops'], float), int(flag['--vocab']), int(flag['--max-len']),
                _numbers('--ratios', flag['--ratios'], float), **dial_settings(flag['--dial']))
    stored = json.loads((ROOT/'nbs/scaling_laws.json').read_text(encoding='utf-8'))
    assert {(r['depth'], r['params'], r['tokens']) for r in runs} == {(m['depth'], m['params'], m['tokens']) for m in stored['runs']}
    assert set(stored['later']['added']) <= {m['tag'] for m in stored['runs']} and 'commit' in stored['later']['environment']
    assert len(stored['runs']) == len(runs) and stored['series'] == flag['--tag'] and stored['vocab_size'] == int(flag['--vocab'])

def test_the_stored_law_is_that_of_the_stored_runs():
    stored = json.loads((ROOT/'nbs/scaling_laws.json').read_text(encoding='utf-8'))
    assert fit_series(stored, E=stored['marks']['entropy of the corpus'], draws=1).law._asdict() == pytest.approx(stored['law'])
