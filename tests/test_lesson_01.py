"The exercises of lesson 01: what is handed out fails, the solution passes, and typical mistakes are named"
import random, re
import pytest
from test_lessons import ROOT, exercises
from nanochat.tinyworld import documents
from nanochat.tokenizer import SPECIALS, merge_parts, train_bpe

@pytest.fixture(scope='module')
def scope():
    world = [d.text for d in documents(3000)]
    return dict(random=random, re=re, world=world, merge_parts=merge_parts, SPECIALS=SPECIALS, toks={v: train_bpe(world, v) for v in (512, 1024, 2048)})

LESSON = exercises(ROOT/'lessons/01_tokens.ipynb')

def verdict(scope, number, code):
    "What the grader says about `code`"
    scope = dict(scope)
    *lines, last = LESSON[number]['grader'].splitlines()
    exec(code + '\n' + '\n'.join(lines), scope)
    return eval(last, scope)

@pytest.mark.parametrize('number', [1, 2, 3])
def test_solution(scope, number):
    assert verdict(scope, number, LESSON[number]['yours']) != 'right'
    assert verdict(scope, number, re.search(r'```python\n(.*?)```', LESSON[number]['hints'], re.S)[1]) == 'right'

GIVE = 'def give_ids(ranks, names, vocab_size):\n    '
MISTAKES = [
    (1, 'def encode_word(ranks, word): pass', 'returns nothing'),
    (1, 'def encode_word(ranks, word): return [word[:1], word[2:]]', 'lost or doubled'),
    (1, 'encode_word = lambda ranks, word: longest_first(ranks, word)', 'longest token'),
    (2, GIVE + 'return {n: len(ranks) + i for i, n in enumerate(names)}', 'nobody complained'),
    (2, GIVE + 'if len(ranks) + len(names) > vocab_size: raise ValueError("no room")\n    return dict(zip(names, range(len(ranks), vocab_size)))', 'name'),
    (3, 'def extremes(tok, n): return "a" * n, "港" * n', 'Nearly'),
    (3, 'def extremes(tok, n): return "a" * n, "\U0001F980" * n', 'are enough'),
    (3, 'def extremes(tok, n): return "a", "b"', 'should have 240'),
]

@pytest.mark.parametrize('number, code, words', MISTAKES)
def test_mistakes_are_named(scope, number, code, words):
    assert words in verdict(scope, number, code)
