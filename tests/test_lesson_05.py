"The graders of lesson 05: solutions pass, what is handed out does not, likely mistakes are named; and what the lesson claims holds for any gradient"
import math, random, re
import nbformat, pytest, torch
from test_lessons import ROOT, exercises, solution as folded
from nanochat.optim import cautious_decay, polar_coefficients, polar_express

PATH = ROOT/'lessons/05_muon.ipynb'
LESSON = exercises(PATH)
CELLS = {c['id']: c.source for c in nbformat.read(PATH, 4).cells}

pytestmark = pytest.mark.usefixtures('one_thread')

def scope(): return dict(math=math, random=random, torch=torch, polar_express=polar_express, polar_coefficients=polar_coefficients)

def verdict(number, code):
    "What the grader of an exercise says about `code`"
    s = scope()
    *lines, last = LESSON[number]['grader'].splitlines()
    exec('\n'.join([CELLS.get(f'exercise-{number}-spec', ''), LESSON[number].get('given', ''), code, *lines]), s)
    return eval(last, s)

def solution(number): return folded(LESSON[number])

@pytest.mark.parametrize('number', [1, 2, 3])
def test_the_solution_is_right_and_what_is_handed_out_is_not(number):
    assert verdict(number, LESSON[number]['yours']) != 'right'
    assert verdict(number, solution(number)) == 'right'

POLY, STEP, BEST = 'def polynomial(X, a, b, c): ', 'def decayed_step(W, update, lr, decay): ', 'def best_step(G, ruler):\n    '
REST = "if ruler == 'length': return G / G.norm()\n    if ruler == 'entry': return G.sign()\n    "
MISTAKES = [
    (1, POLY + 'pass', 'returns nothing'),
    (1, POLY + 'return a * X + b * X**3 + c * X**5', 'products are those of matrices'),
    (1, POLY + 'return a * X + b * X @ X.mT @ X', 'the last term is missing'),
    (1, POLY + 'return a * X + (b + c) * X @ X.mT @ X', 'needs XXᵀ twice, you have it once'),
    (1, POLY + 'A = X @ X.mT; return a * X + (b * A + c * A * A) @ X', 'entry by entry'),
    (1, POLY + 'A = X @ X.mT; return (b * A + c * A @ A) @ X', 'first term'),
    (1, POLY + 'A = X.mT @ X; return a * X + (b * A + c * A @ A) @ X', 'XXᵀX, and not XᵀXX'),
    (1, POLY + 'return X.mT', 'shape'),
    (1, POLY + 'return -X', 'it should be'),
    (2, STEP + 'pass', 'returns nothing'),
    (2, LESSON[2]['yours'], 'two things'),
    (2, solution(2).replace('> 0', '< 0'), 'makes the weight larger'),
    (2, solution(2).replace('lr * decay', 'decay'), 'by too much'),
    (2, STEP + 'return W - lr * update - lr * decay * W', 'all weights are decayed'),
    (2, STEP + 'return W - lr * update', 'nothing is decayed'),
    (2, solution(2).replace('- lr * decay', '+ lr * decay'), 'away from zero'),
    (2, STEP + 'return W.sub_(lr * update)', 'have changed'),
    (2, STEP + 'return W', 'it should be'),
    (2, STEP + 'return W[0]', 'shape (3,)'),
    (2, solution(2).replace('> 0', '>= 0'), 'where the update is 0'),
    (2, solution(2).replace('> 0', '> .1'), 'it should be'),
    (3, BEST + 'pass', 'returns nothing'),
    (3, BEST + 'return G', 'size'),
    (3, BEST + 'return -G / G.norm()', 'goes up'),
    (3, BEST + 'return G.mT', 'shape'),
    (3, BEST + 'return 0.5 * G / G.norm()', 'a larger one'),
    (3, BEST + "return G / size(G, ruler)", 'step of another ruler'),
    (3, BEST + REST + 'return G.sign() / size(G.sign(), ruler)', 'step of another ruler'),
    (3, BEST + 'X = torch.randn(G.shape, generator=torch.Generator().manual_seed(1), dtype=G.dtype) + 1e-3 * G; X = X * (G * X).sum().sign(); return X / size(X, ruler)', 'random steps'),
]

@pytest.mark.parametrize('number, code, words', MISTAKES)
def test_mistakes_are_named(number, code, words):
    assert words in verdict(number, code)

def test_answers_in_float32_are_right_too():
    assert verdict(1, POLY + 'X = X.float(); A = X @ X.mT; return a * X + (b * A + c * A @ A) @ X') == 'right'
    assert verdict(2, solution(2).replace('pull)', 'pull.float())').replace('return W -', 'return W.float() -')) == 'right'

@pytest.mark.parametrize('number, code', [(1, POLY + 'A = X @ X.mT; Y = a * X + (b * A + c * A @ A) @ X; Y[-1, -1] += 1; return Y'), (2, solution(2).replace('> 0', '> .1'))])
def test_the_number_that_is_told_is_one_that_is_wrong(number, code):
    got, want = re.search(r'(?:is|give) (-?[\d.]+), and it should be (-?[\d.]+)', verdict(number, code)).groups()
    assert got != want

def test_the_planted_decay_keeps_small_what_the_right_one_lets_grow():
    size = {}
    for name, code in (('planted', LESSON[2]['yours']), ('right', solution(2))):
        s = scope(); exec(code, s)
        W, u = torch.full((3,), .1), torch.tensor([-1., -.5, -2.])
        for _ in range(500): W = s['decayed_step'](W, u, .1, .2)
        size[name] = W.norm().item()
    assert size['planted'] < 2 and size['right'] > 50 * size['planted']

def test_the_spec_of_the_decay_is_that_of_the_package():
    s = scope()
    exec(CELLS['exercise-2-spec'], s)
    W, u = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(s['slow_step'](W, u, .1, .5), W - .1 * (u + .5 * cautious_decay(W, u)))

def test_the_cosine_follows_from_the_singular_values():
    "sum of the singular values over their length times the root of their number, as the lesson computes it"
    for seed in range(5):
        G = torch.randn(12, 30, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -1, 30)
        s, O = torch.linalg.svdvals(G), polar_express(G, 10)
        assert ((G * O).sum() / (G.norm() * O.norm())).item() == pytest.approx((s.sum() / (s.norm() * math.sqrt(12))).item(), abs=1e-3)

def test_the_bug_needs_two_matrices_of_different_size():
    s = scope()
    exec(CELLS['bug-code'], s)
    G = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    for K, sizes, found in ((1, [1.], False), (3, [1., 1., 1.], False), (3, [1., 1e-4, 1.], True)):
        some = G[:K] * torch.tensor(sizes)[:, None, None]
        ratio = s['stacked_polar'](some).norm(dim=(1, 2)) / polar_express(some).norm(dim=(1, 2))
        assert ((ratio - 1).abs().max() > .5) == found, sizes
