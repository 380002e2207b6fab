"The folded solutions of every lesson satisfy its graders, and what the lesson hands out does not"
import re
from pathlib import Path
import nbformat, pytest, torch

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT/'lessons').glob('[0-9]*.ipynb'))

def exercises(path):
    "{number: {'yours' | 'given': code, 'grader': code, 'hints': solution}} of a lesson, by the ids of its cells"
    found = {}
    for c in nbformat.read(path, 4).cells:
        m = re.fullmatch(r'exercise-(\d+)-(yours|given|grader|hints)', c['id'])
        if m: found.setdefault(int(m[1]), {})[m[2]] = c.source
    return found

def solution(e):
    "The code of the solution that an exercise folds away"
    return re.search(r'```python\n(.*?)```', e['hints'], re.S)[1]

def changed(text, old, new):
    "A solution with one mistake"
    assert text.count(old) == 1, (old, text.count(old))
    return text.replace(old, new)

@pytest.mark.parametrize('lesson', LESSONS, ids=lambda p: p.stem)
def test_lesson_has_three_exercises_with_solutions(lesson):
    found = exercises(lesson)
    assert len(found) >= 3
    for n, e in found.items(): assert 'grader' in e and '```python' in e['hints'] and e['hints'].count('<summary>Hint') == 3, n

@pytest.mark.parametrize('lesson', LESSONS, ids=lambda p: p.stem)
def test_headers_carry_their_cost_and_quiz_options_their_reason(lesson):
    text = [c.source for c in nbformat.read(lesson, 4).cells if c.cell_type == 'markdown']
    headers = re.findall(r'^## (.+)$', '\n'.join(text), re.M)
    assert all(re.search(r'\(\d+ min', h) for h in headers if h not in ('Exercises', 'Quiz', 'Open questions')), headers
    quiz = next(t for t in text if t.startswith('## Quiz'))
    questions = re.split(r'^\*\*\d+\. ', quiz, flags=re.M)[1:]
    assert len(questions) >= (3 if lesson.stem.startswith('00') else 4)
    for q in questions:
        reasons = re.findall(r'</summary>(.+?)</details>', q)
        assert len(reasons) == q.count('<summary>') >= 2 and sum(r.startswith('Yes') for r in reasons) == 1, q

@pytest.mark.parametrize('number', [1, 2])
def test_quickstart_solutions(number):
    e = exercises(ROOT/'lessons/00_quickstart.ipynb')[number]
    scope = {}
    exec('import math, random, re', scope)
    *lines, last = e['grader'].splitlines()
    exec(e['yours'] + '\n' + '\n'.join(lines), scope)
    assert eval(last, scope) != 'right'
    exec(solution(e), scope)
    assert eval(last, scope) == 'right'

def test_quickstart_solution_3():
    "On an untrained model: the grader asks for agreement, not for knowledge"
    import torch
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tinyworld import documents
    from nanochat.tokenizer import train_bpe
    e = exercises(ROOT/'lessons/00_quickstart.ipynb')[3]
    tok = train_bpe([d.text for d in documents(300)], 512)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tok.n_vocab, n_layer=1, n_head=1, n_kv_head=1, head_dim=32))
    torch.nn.init.normal_(model.lm_head.weight, std=.2)
    scope = dict(model=model, tok=tok)
    exec('import math, random, re, torch', scope)
    *lines, last = e['grader'].splitlines()
    exec(e['given'] + '\n' + '\n'.join(lines), scope)
    assert eval(last, scope) != 'right'
    exec(solution(e), scope)
    assert eval(last, scope) == 'right'
