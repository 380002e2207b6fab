"The graders of lesson 02: solutions pass, what is handed out does not, and likely mistakes are named"
import random, re
from pathlib import Path
import pytest
from test_lessons import exercises

LESSON = Path(__file__).resolve().parent.parent/'lessons/02_batches.ipynb'

def grade(number, answer):
    "What the grader of an exercise says to `answer`"
    e = exercises(LESSON)[number]
    *lines, last = e['grader'].splitlines()
    scope = {}
    exec('import random\nfrom nanochat.dataloader import best_fit_crop, best_fit_split, concatenate, greedy', scope)
    exec('\n'.join(lines) + '\n' + answer, scope)
    return eval(last, scope)

@pytest.mark.parametrize('number', [1, 2, 3])
def test_solutions_are_right_and_what_is_handed_out_is_not(number):
    e = exercises(LESSON)[number]
    assert grade(number, e['yours']) != 'right'
    assert grade(number, re.search(r'```python\n(.*?)```', e['hints'], re.S)[1]) == 'right'

LEDGER = '''
def ledger(rows, sizes, row_len):
    pieces = [p for row in rows for p in row]
    read, split, emitted = sum(sizes), {split}, sum(p.size for p in pieces)
    return dict(read=read, split=split, emitted=emitted, padded={padded}, dropped={dropped})'''
GOOD = dict(split='len(pieces) - len(sizes)', padded='len(rows)*row_len - emitted', dropped='read + split - emitted')

@pytest.mark.parametrize('wrong, says', [(dict(padded='sum(row_len - sum(p.size for p in r) for r in rows[:-1])'), 'the last row counts too'),
    (dict(dropped='read - emitted'), 'a cut adds a BOS'), (dict(split='sum(p.start > 0 for p in pieces)'), 'only a BOS')])
def test_mistakes_in_the_ledger_are_named(wrong, says): assert says in grade(1, LEDGER.format(**{**GOOD, **wrong}))

def test_mistakes_in_the_packer_are_named():
    yours = exercises(LESSON)[2]['yours']
    assert 'what fills the slots' in grade(2, yours)
    assert 'empty row' in grade(2, yours.replace('if not row: break', 'if not row: waiting.clear()'))
    silent = yours.replace('todo, rows, left_out = [], list(enumerate(sizes)), [], []', 'todo, rows, left_out = [], [(i, n) for i, n in enumerate(sizes) if n <= row_len], [], []')
    assert silent != yours and 'nothing may vanish in silence' in grade(2, silent)

@pytest.mark.parametrize('body, says', [('[(p.size - 2)/2 for r in rows for p in r]', 'mean of means'), ('[k for r in rows for p in r for k in range(p.size)]', 'BOS is not one')])
def test_mistakes_in_the_mean_are_named(body, says): assert says in grade(3, f'def mean_context(rows):\n    x = {body}\n    return sum(x)/len(x)')

def test_the_packers_differ_in_context_as_the_exercise_says():
    "Splitting costs little context; crop keeps the long beginnings and drops the rest"
    from nanochat.dataloader import best_fit_split, greedy
    rng = random.Random(0)
    sizes = [int(rng.lognormvariate(6.44, 1)) + 2 for _ in range(1500)]
    mean = {}
    for f in (best_fit_split, greedy):
        tokens = [p.size - 1 for r in f(sizes, 2049) for p in r]
        mean[f] = sum(n*(n - 1)/2 for n in tokens)/sum(tokens)
    assert .8 < mean[best_fit_split]/mean[greedy] < 1.6
