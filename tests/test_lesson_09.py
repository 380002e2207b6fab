"The graders of lesson 09: solutions pass, what is handed out does not, likely mistakes are named; and what the lesson claims about its learner"
import math, os, random, secrets, socket, tempfile
from pathlib import Path
import nbformat, pytest
from test_lessons import ROOT, changed, exercises, solution as folded
from nanochat.sandbox import Limits, judge, level, read_literal, run

PATH = ROOT/'lessons/09_tools.ipynb'
LESSON = exercises(PATH)
CELLS = {c['id']: c.source for c in nbformat.read(PATH, 4).cells}
HERE = level()
pytestmark = pytest.mark.skipif(HERE.number == 0, reason='no program can be run here')

def scope():
    s = dict(math=math, os=os, random=random, secrets=secrets, socket=socket, tempfile=tempfile, Path=Path, Limits=Limits, judge=judge,
             read_literal=read_literal, run=run, WALLS=HERE, UNSAFE=dict(accept_unsafe=HERE.number < 2))
    exec(CELLS['cheats'], s)
    return s

def verdict(number, code):
    "What the grader of an exercise says about `code`"
    s = scope()
    *lines, last = LESSON[number]['grader'].splitlines()
    for cell in (CELLS.get(f'exercise-{number}-spec', ''), LESSON[number].get('given', ''), CELLS.get(f'exercise-{number}-attacks', '')): exec(cell, s)
    exec('\n'.join([code, *lines]), s)
    return eval(last, s)

def solution(number): return folded(LESSON[number])

needs_walls = pytest.mark.skipif(HERE.number < 2, reason=f'needs level 2; this machine reaches {HERE.number}: {HERE.why}')

@pytest.mark.parametrize('number', [1, 2, pytest.param(3, marks=needs_walls)])
def test_the_solution_is_right_and_what_is_handed_out_is_not(number):
    assert verdict(number, LESSON[number]['yours']) != 'right'
    assert verdict(number, solution(number)) == 'right'

def cheat(program): return f'def cheat(): return {program!r}'
def grade(old, new): return changed(solution(2), old, new)
def escape(jail, program): return changed(solution(3), {'no landlock': "return f'print(open({flag!r}).read())'", 'no seccomp': "return f'import os; os.chmod({flag!r}, 0o600)'",
    'no net': """return f'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("127.0.0.1", {port}))'"""}[jail], 'return ' + program)

MISTAKES = {
    'no-text': (1, 'def cheat(): pass', 'the text of a program'),
    'exit': (1, cheat('import sys; sys.exit(0)'), 'leaving early'),
    'hard-exit': (1, cheat('import os\ndef solve(x): os._exit(0)'), 'leaving early'),
    'false': (1, cheat('def solve(x): return True'), 'one of its two sides'),
    'own-word': (1, cheat('print("ok")\ndef solve(x): raise ValueError'), 'does not get that far: ValueError'),
    'syntax': (1, cheat('def solve(x) return x'), 'SyntaxError'),
    'as-handed-out': (2, LESSON[2]['yours'], 'raised SyntaxError'),
    'only-first': (2, grade("    return 'pass'", "        return 'pass'"), 'only the first case'),
    'eval': (2, grade('try: got = read_literal(lines[-1])\n        except ValueError', 'try: got = eval(lines[-1])\n        except Exception'), 'eval is not for strangers'),
    'eval-nothing': (2, grade('try: got = read_literal(lines[-1])\n        except ValueError', 'try: got = eval(lines[-1], {})\n        except Exception'), 'eval is not for strangers'),
    'eval-bare': (2, grade('try: got = read_literal(lines[-1])\n        except ValueError', "try: got = eval(lines[-1], {'__builtins__': {}})\n        except Exception"), 'eval is not for strangers'),
    'int': (2, grade('read_literal(lines[-1])', 'int(lines[-1])'), 'read any literal'),
    'only-last': (2, grade('in cases:', 'in cases[-1:]:'), 'only the last case'),
    'goodbye': (2, grade("if found.verdict != 'done' or not lines: return 'fail'", "if not lines and found.verdict != 'done': return 'pass'"), 'leaves passes'),
    'prints-and-leaves': (2, grade("found.verdict != 'done' or not lines", 'not lines'), 'prints and leaves passes'),
    'raises': (2, grade('except ValueError', 'except KeyError'), 'raised ValueError'),
    'whole-output': (2, grade('lines = found.stdout.splitlines()', 'lines = [found.stdout.strip()]'), 'which line'),
    'no-verdict': (2, 'def grade(code, cases): return True', "'pass' or 'fail'"),
    'nothing-passes': (2, "def grade(code, cases): return 'fail'", 'an honest program fails'),
    'everything-passes': (2, "def grade(code, cases): return 'pass'", 'leaves passes'),
    'not-solved': (3, LESSON[3]['yours'], 'not solved yet'),
    'no-effect': (3, escape('no landlock', "'x = 1'"), 'no landlock: it ran to its end'),
    'breaks': (3, escape('no landlock', "'1/0'"), 'ends with error: ZeroDivisionError'),
    'opens': (3, escape('no seccomp', "f'open({flag!r}, \"a\")'"), 'no seccomp: forbidden'),
    'wrong-mode': (3, escape('no seccomp', "f'import os; os.chmod({flag!r}, 0o666)'"), 'no seccomp: it ran to its end'),
    'tcp': (3, escape('no net', "f'import socket; socket.create_connection((\"127.0.0.1\", {port}), 1)'"), 'no net: '),
    'wrong-bytes': (3, escape('no net', "f'import socket; socket.socket(2, 2).sendto(b\"bye\", (\"127.0.0.1\", {port}))'"), 'no net: it ran to its end')}

@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_named(name):
    number, code, words = MISTAKES[name]
    if number == 3 and name != 'not-solved' and HERE.number < 2: pytest.skip('needs level 2')
    assert words in verdict(number, code)

def test_another_way_to_pass_is_right_too():
    "The program reads the secret word out of the code that called it"
    hunt = 'import sys, os\ndef solve(x):\n    for text in sys._getframe(1).f_code.co_consts: print(text)\n    sys.stdout.flush(); os._exit(0)'
    assert verdict(1, cheat(hunt)) == 'right'

def test_a_program_that_keeps_the_line_of_the_template_is_right_too():
    kept = 'class Yes:\n    def __eq__(self, other): return True\ndef solve(x):\n    ...                      # your lines here\n    return Yes()'
    assert verdict(1, cheat(kept)) == 'right' and 'not solved yet' in verdict(1, LESSON[1]['yours'])

def test_reading_with_ast_is_right_too():
    "The standard library's reader of literals, if all that it may raise is caught"
    own = grade('try: got = read_literal(lines[-1])\n        except ValueError', 'import ast\n        try: got = ast.literal_eval(lines[-1])\n        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)')
    assert verdict(2, own) == 'right'

def test_a_grader_by_the_project_is_a_solution():
    own = "def grade(code, cases): return judge(code, 'solve', cases, Limits(seconds=2), **UNSAFE).verdict.replace('error', 'fail').replace('crashed', 'fail')"
    assert verdict(2, own) == 'right'

def test_the_learner_follows_the_grader_and_not_the_seed():
    s = scope()
    exec(CELLS['learner'], s)
    for seed in range(20):
        assert s['learn'](True, seed=seed)[-1] > .9 and s['learn'](False, seed=seed)[-1] < .03
        assert s['learn'](True, tasks=50, seed=seed)[0] == pytest.approx(.02)
