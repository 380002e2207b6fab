"The graders of lesson 08: solutions pass, what is handed out does not, likely mistakes are named; and what the lesson counts is right on any machine"
import math, random, re, statistics
import nbformat, pytest, torch
from hypothesis import given, settings, strategies as st
from test_lessons import ROOT, changed, exercises, solution as folded
from nanochat.gpt import GPT, GPTConfig
from nanochat.scripts.infer_bench import step_bytes

PATH = ROOT/'lessons/08_inference.ipynb'
LESSON = exercises(PATH)
CELLS = {c['id']: c.source for c in nbformat.read(PATH, 4).cells}

pytestmark = pytest.mark.usefixtures('one_thread')

def scope(): return dict(math=math, random=random, statistics=statistics, torch=torch)

def verdict(number, code):
    "What the grader of an exercise says about `code`"
    s = scope()
    *lines, last = LESSON[number]['grader'].splitlines()
    exec('\n'.join([CELLS[f'exercise-{number}-spec'], LESSON[number].get('given', ''), code, *lines]), s)
    return eval(last, s)

def solution(number): return folded(LESSON[number])
def function(number, name, cell='solution'):
    s = scope()
    exec(solution(number) if cell == 'solution' else CELLS[cell], s)
    return s[name]

@pytest.mark.parametrize('number', [1, 2, 3])
def test_the_solution_is_right_and_what_is_handed_out_is_not(number):
    assert verdict(number, LESSON[number]['yours']) != 'right'
    assert verdict(number, solution(number)) == 'right'

BYTES, ROWS, GUESS = 'def bytes_of_step(layers, C, V, lengths): ', 'def memory_rows(M, r, f, read, products): ', 'def best_guesses(p, step, most):\n    '
REST = '\n    best = max(map(rate, range(most + 1)))\n    return next(k for k in range(most + 1) if rate(k) >= best*(1 - 1e-12))'
MISTAKES = [
    (1, BYTES + 'pass', 'returns nothing'),
    (1, changed(solution(1), '4*(once', '(once'), 'four each'),
    (1, changed(solution(1), '4*(once', '4*(len(lengths)*once'), 'once for all rows'),
    (1, changed(solution(1), 'len(lengths)*C', 'V*C'), 'not read whole'),
    (1, changed(solution(1), ' + len(lengths)*C', ''), 'looks up its new token'),
    (1, changed(solution(1), ' + V*C', ''), 'the head is a matrix too'),
    (1, changed(solution(1), '2*layers*C*sum', 'layers*C*sum'), 'two vectors'),
    (1, changed(solution(1), '2*layers*C*sum', '2*C*sum'), 'every layer'),
    (1, changed(solution(1), ' + 2*layers*C*sum(lengths)', ''), 'earlier tokens'),
    (1, changed(solution(1), 'sum(lengths)', 'len(lengths)*max(lengths)'), 'its own length'),
    (1, BYTES + 'return 7', 'it should be'),
    (2, ROWS + 'pass', 'returns nothing'),
    (2, LESSON[2]['yours'], 'read as well'),
    (2, changed(solution(2), 'if left > 0', 'if left != 0'), 'math.inf'),
    (2, ROWS + 'left = f/products - r/read; return math.floor(M/read/left) + 1 if left > 0 else math.inf', 'one too many'),
    (2, ROWS + 'left = f/products - r/read; return max(1, math.floor(M/read/left)) if left > 0 else math.inf', 'none at all'),
    (2, ROWS + 'left = f/products - r/read; return M/read/left if left > 0 else math.inf', 'round down'),
    (2, ROWS + 'return math.inf if f/products <= r/read else math.floor((M + r)/read*products/f)', 'not once'),
    (2, ROWS + 'return math.inf if f/products <= r/read else math.floor(M/read/(f/products + r/read))', 'a minus'),
    (2, ROWS + 'left = f/products - r/read; return math.floor(M/left) if left > 0 else math.inf', 'bytes per second'),
    (2, ROWS + 'return M/0', 'two slopes are equal'),
    (2, changed(solution(2), 'if left > 0', 'if left >= 0'), 'two slopes are equal'),
    (2, ROWS + 'return -3', 'it should be'),
    (2, changed(solution(2), 'else math.inf', 'else 0'), 'math.inf'),
    (3, GUESS + 'pass', 'returns nothing'),
    (3, GUESS + 'def rate(k): return (sum(p**i for i in range(k + 1)) - 1)/step(k + 1)' + REST, 'token of its own'),
    (3, GUESS + 'def rate(k): return (1 + k*p)/step(k + 1)' + REST, 'if all before it were right'),
    (3, GUESS + 'def rate(k): return (1 + k*p**k)/step(k + 1)' + REST, 'when not all are'),
    (3, changed(solution(3), '/ step(k + 1)', '/ step(max(k, 1))'), 'reads k + 1 tokens'),
    (3, changed(solution(3), '/ step(k + 1)', '/ step(1)'), 'takes longer'),
    (3, LESSON[3]['yours'], 'always the most'),
    (3, GUESS + 'return 0', 'never guessing'),
    (3, GUESS + 'return 1', 'tokens_by_trying'),
]

@pytest.mark.parametrize('number, code, words', MISTAKES, ids=[f'{n}-{i}' for i, (n, *_) in enumerate(MISTAKES)])
def test_mistakes_are_named(number, code, words):
    assert words in verdict(number, code)

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_the_bytes_of_exercise_1_are_those_of_the_model(layers, heads, lengths):
    model = GPT(GPTConfig(vocab_size=128, n_layer=layers, n_head=heads, n_kv_head=heads, head_dim=8, max_len=32))
    assert function(1, 'bytes_of_step')(layers, 8*heads, 128, lengths) == step_bytes(model, lengths)

@settings(max_examples=60, deadline=None)
@given(st.floats(1, 1e4), st.floats(0, 100), st.floats(.1, 1e4), st.floats(1, 1e3), st.floats(1, 1e5))
def test_where_memory_and_arithmetic_meet(M, r, f, read, products):
    "The formula of the lesson: equal there, memory before, arithmetic behind"
    B = function(0, 'crossover', 'crossover-code')(M, r, f, read, products)
    memory, arithmetic = lambda n: (M + n*r)/read, lambda n: n*f/products
    if B == math.inf: assert memory(1e9) >= arithmetic(1e9)*(1 - 1e-9)
    else:
        assert memory(B) == pytest.approx(arithmetic(B), rel=1e-3)
        assert memory(B/2) > arithmetic(B/2) and memory(2*B) < arithmetic(2*B)
        assert function(2, 'memory_rows')(M, r, f, read, products) in (math.floor(B), math.floor(B*(1 + 1e-12)))

@pytest.mark.parametrize('p, k', [(.1, 1), (.5, 3), (.9, 8)])
def test_tokens_of_a_step_with_guesses(p, k):
    s = scope()
    exec(CELLS['exercise-3-given'], s)
    assert s['tokens_by_trying'](p, k) == pytest.approx(sum(p**i for i in range(k + 1)), rel=.03)

def test_guesses_pay_under_the_bend_and_not_behind_it():
    best = function(3, 'best_guesses')
    assert best(.3, lambda n: max(10., n), 12) > 4                 # memory sets the pace: even bad guesses pay
    assert best(.3, lambda n: float(n), 12) == 0                   # arithmetic does: each guess costs a token

def test_the_lesson_asserts_no_clock():
    "Measured names stand in no assert: the lesson holds on any machine"
    measured = ('prompts', 'steps', 'alone', 'read', 'products', 'share')
    for id, text in CELLS.items():
        if id.startswith('exercise') or id == 'crossover-code': continue
        for line in re.findall(r'^\s*assert .*$', text, re.M):
            assert not [w for w in measured if re.search(rf'\b{w}\b', line)], (id, line)
