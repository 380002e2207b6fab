"The tiny world beyond its pages: the same text everywhere, a bill that brute force confirms, derived sets that are right and leak nothing"
import csv, hashlib, json, math, os, re, subprocess, sys
from collections import Counter
from pathlib import Path
import pytest
from nanochat import tinyworld as world, worldtasks as tasks
from nanochat.common import UserError
from nanochat.conversation import check_conversation
from nanochat.tools import run_tool

ROOT = Path(__file__).resolve().parent.parent

def plain(items): return [x if isinstance(x, (dict, str)) else vars(x) if not hasattr(x, '_asdict') else x._asdict() for x in items]
def digest(items): return hashlib.sha256(json.dumps(plain(items), sort_keys=True, default=str).encode()).hexdigest()[:12]

SETS = {
    'documents': lambda: [d.text for d in world.documents(1000)], 'conversations': lambda: world.conversations(1000), 'exam': lambda: world.evaluation(),
    'problems': lambda: tasks.problems(200), 'exam problems': lambda: tasks.problems(100, exam=True), 'programs': lambda: tasks.programs(100),
    'chat tasks': lambda: tasks.chat_tasks(150), 'preferences': lambda: tasks.preferences(150), 'sft': lambda: tasks.sft_conversations(300),
    'core': lambda: [row for label in tasks.CORE_TASKS for row in tasks.core_rows(label, 40)]}
GOLDEN = {'documents': 'cff4c13f0d78', 'conversations': 'cc9685b92e84', 'exam': '817b716f4950', 'problems': '17aa2972ce03',
          'exam problems': 'd76803e21e8e', 'programs': '36e87b857060', 'chat tasks': '01269d3c92df',
          'preferences': '30f09c1efe67', 'sft': '8ed4c7d89d15', 'core': '050706661412'}

@pytest.mark.parametrize('name', SETS)
def test_the_same_on_every_machine(name):
    "A recipe names a seed, and a result names a recipe: these change on purpose or never"
    assert digest(SETS[name]()) == GOLDEN[name]

def test_the_order_of_hashing_does_not_matter():
    code = "import sys; sys.path.insert(0, 'tests'); import test_tinyworld as t; print({k: t.digest(t.SETS[k]()) for k in list(t.SETS)[3:]})"
    run = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': '7', 'OMP_NUM_THREADS': '1'}, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert eval(run.stdout) == dict(list(GOLDEN.items())[3:])

# the bill

class Forced(world.Dice):
    "Dice that follow a path of choices, then always take the first option"
    def __init__(self, path): self.path, self.sizes, self.p, self.bits, self.rng = path, [], 1., 0., self
    def random(self): return self.x
    def force(self, weights, throw):
        j, total = self.path[len(self.sizes)] if len(self.sizes) < len(self.path) else 0, sum(weights)
        self.sizes.append(len(weights)); self.p *= weights[j] / total
        self.x = (sum(weights[:j]) + weights[j] / 2) / total
        return throw()
    def below(self, n): return self.force([1] * n, lambda: world.Dice.below(self, n))
    def cases(self, *sizes): return self.force(sizes, lambda: world.Dice.cases(self, *sizes))
    def weighted(self, options): return self.force([*options.values()], lambda: world.Dice.weighted(self, options))

def entropy_and_bill(writer):
    p, bill, todo = Counter(), 0., [[]]
    while todo:
        path = todo.pop()
        dice = Forced(path)
        p[writer(dice)] += dice.p
        bill += dice.p * dice.bits
        taken = path + [0] * (len(dice.sizes) - len(path))
        todo += [taken[:i] + [j] for i in range(len(path), len(taken)) for j in range(1, dice.sizes[i])]
    assert math.isclose(sum(p.values()), 1)
    return -sum(q * math.log2(q) for q in p.values()), bill

def a_choice(dice):
    f = dice.pick([f for f in world.CHOICES if len(world.RELATIONS[f.relation].values()) < 8][:2])
    return '\n'.join(world.choice_of(dice, f, dice.pick(world.wordings(f)[:2]))[:2])

@pytest.mark.parametrize('writer', ['write_program', '_spelling_line', '_number_line', 'write_story', 'a_choice', 'write_questions', 'write_profile', 'write_statements'])
def test_the_bill_is_the_entropy(writer, monkeypatch):
    "Every way through a writer, in a world made small where that is needed: no choice hides, and none is charged wrongly"
    small = world.FACTS[:3]
    for name, value in dict(NAMES=world.NAMES[:3], THINGS=world.THINGS[:2], PLACES=world.PLACES[:3], ASKED=world.ASKED[:2],
                            OPENERS={'': 8, 'In fact, ': 1}, PROFILES=[fs[:2] for fs in world.PROFILES[:2]]).items(): monkeypatch.setattr(world, name, value)
    monkeypatch.setattr(world, 'FACTS', small)
    for f in [*small, *world.ASKED, *sum(world.PROFILES, [])]:
        monkeypatch.setattr(world.RELATIONS[f.relation], 'say', world.RELATIONS[f.relation].say[:2])
    few = dict(write_questions=2, write_statements=1, write_profile=2).get(writer)
    def run(dice):
        if few: dice.sample = lambda options, k: world.Dice.sample(dice, options, min(k, few))          # fewer sentences, the same choices
        return (a_choice if writer == 'a_choice' else getattr(world, writer))(dice)
    entropy, bill = entropy_and_bill(run)
    hidden = math.log2(6) if writer == 'write_statements' else math.log2(4) if writer == 'write_questions' else 0   # we cut the number of sentences, which hides it
    assert entropy > 1 and math.isclose(entropy + hidden, bill, rel_tol=1e-9)

def test_a_hidden_choice_is_noticed():
    entropy, bill = entropy_and_bill(lambda dice: 'no' if dice.below(3) else 'yes')
    assert bill - entropy > .6

def follow(text):
    "Where the thing is at the end of a story, by following every sentence"
    where, holds, lies = {}, None, None
    for s in re.findall(r'[^.]+\.', text):
        if m := re.fullmatch(r' ?(\w+) is in the (\w+)\.', s): where[m[1]] = m[2]
        elif m := re.fullmatch(r' ?(\w+) takes the \w+\.', s): holds = m[1]
        elif m := re.fullmatch(r' ?(\w+) puts the \w+ down\.', s): lies, holds = where[m[1]], None
        elif m := re.fullmatch(r' ?(\w+) goes to the (\w+)\.', s): where[m[1]] = m[2]
        else: raise AssertionError(s)
    return where[holds] if holds else lies

@pytest.mark.parametrize('steps', [None, 4, 7])
def test_a_story_ends_where_it_says(steps):
    for i in range(300):
        text, thing, where = world.story(world.Dice(i), steps)
        assert follow(text) == where and f'the {thing}' in text
        assert steps is None or text.count('.') == 3 + steps

# problems

@pytest.mark.parametrize('exam', [False, True])
def test_problems_are_right_and_do_not_leak(exam):
    for p in tasks.problems(300, seed=3, exam=exam):
        if p.kind == 'reverse': assert p.expression == f'"{p.answer[::-1]}"[::-1]'
        else: assert run_tool(p.expression) == p.answer, p
        for reply in (p.answer, f'{p.answer}.', f'= {p.answer}', f'#### {p.answer}', f'First 3, then 4, so {p.answer}.', f'**{p.answer}**', f' {p.answer}\n'):
            assert p.reward(reply) == 1., (p, reply)
        for reply in ('', p.prompt, p.answer + '1' if p.answer.isdigit() else p.answer + 'x', 'x' + p.answer, f'not {p.answer} but 9999 things', f'{p.answer} 1 2 3 99999 xs'):
            assert p.reward(reply) == 0., (p, reply)
        assert not re.search(rf'(?<!\w){re.escape(p.answer)}(?!\w)', p.prompt)

def test_the_numbers_18_in_every_dress():
    p = tasks.Problem(1, 'sum', 'What is 9 + 9?', '18', '9 + 9')
    for reply in ('18', '18.', '= 18', '#### 18.', '$18', '18 dollars', '18.0', '18.00', '1 + 17 = 18', 'The answer is **18**.', '$18.', '18!', '18\n', '(18)', '£18', '18,'):
        assert p.check(reply), reply
    for reply in ('', '1 8', '180', '118', '-18', '1.8', '18.5', '18 or 19', '#### 19', '18 #### 17', '١٨٠', 'eighteen', '1,018', '#### '):
        assert not p.check(reply), reply
    assert tasks.Problem(5, 'x', '', '1234', '').check('That makes 1,234.')

def test_no_problem_of_one_split_is_in_the_other():
    train, exam = tasks.problems(2500, seed=1), tasks.problems(400, seed=2, exam=True)
    assert not {(p.kind, *p.key) for p in train} & {(p.kind, *p.key) for p in exam}
    assert {p.level for p in train} == {p.level for p in exam} == {1, 2, 3, 4, 5}

# programs

HARNESS = '''
import json, sys
rows = json.load(sys.stdin)
def passes(source, tests):
    scope = {}
    try: exec(source, scope); exec(tests, scope)
    except Exception: return False
    return True
print(json.dumps([[passes(r['solution'], '\\n'.join(r['tests'])), passes(r['wrong'], '\\n'.join(r['tests'])),
    passes(r['he']['prompt'] + r['he']['canonical_solution'], r['he']['test'] + '\\ncheck(' + r['he']['entry_point'] + ')')] for r in rows]))
'''

def test_reference_solutions_pass_and_planted_ones_fail():
    "In a process of its own. Every family, both splits; the tests' answers come from a specification beside the solution"
    rows = tasks.programs(500, seed=4) + tasks.programs(100, seed=4, exam=True) + [tasks.make_program(f, k) for f in tasks.FAMILIES for k in range(2, 100)]
    told = json.dumps([{**p._asdict(), 'he': p.humaneval()} for p in rows])
    run = subprocess.run([sys.executable, '-I', '-c', HARNESS], input=told, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    for p, (right, wrong, humaneval) in zip(rows, json.loads(run.stdout)):
        assert right and humaneval and not wrong, p.name
        assert p.solution not in p.prompt and p.name in p.prompt and not any(t in p.prompt for t in p.tests)

def test_programs_are_held_out_by_combination_and_by_family():
    train, exam = tasks.programs(900, seed=1), tasks.programs(200, seed=2, exam=True)
    assert not {p.key for p in train} & {p.key for p in exam}
    new = {p.key[0] for p in exam} - {p.key[0] for p in train}
    assert new and new < {p.key[0] for p in exam}

# in-context tasks

def read_list(path):
    "The tasks of a core.yaml, as text"
    tasks, text = [], Path(path).read_text()
    for block in re.split(r'^- ', text, flags=re.M)[1:]: tasks.append(dict(re.findall(r'^ *(\w+): (.*)$', block, re.M)))
    return tasks

FIELDS = {'multiple_choice': {'query', 'choices', 'gold'}, 'schema': {'context_options', 'continuation', 'gold'}, 'language_modeling': {'context', 'continuation'}}

def test_the_core_folder(tmp_path):
    folder = tasks.write_core(tmp_path/'core', n=80, seed=3)
    listed = read_list(folder/'core.yaml')
    with open(folder/'eval_meta_data.csv', newline='') as f: baselines = {r['Eval Task']: float(r['Random baseline']) for r in csv.DictReader(f)}
    assert {t['label'] for t in listed} == set(baselines) == set(tasks.CORE_TASKS) and {t['icl_task_type'] for t in listed} == set(FIELDS)
    for t in listed:
        rows = [json.loads(l) for l in (folder/'eval_data'/t['dataset_uri']).read_text().splitlines()]
        assert len(rows) == 80 and all(set(r) == FIELDS[t['icl_task_type']] for r in rows)
        options = [r.get('choices') or r.get('context_options') for r in rows if 'gold' in r]
        if options:
            golds = Counter(r['gold'] for r in rows)
            assert all(len(set(o)) == len(o) == 100 / baselines[t['label']] for o in options) and set(golds) == set(range(len(options[0])))
        else: assert baselines[t['label']] == 0
    again = tasks.write_core(tmp_path/'again', n=80, seed=3)
    assert all((again/p.relative_to(folder)).read_bytes() == p.read_bytes() for p in folder.rglob('*') if p.is_file())

def test_gold_by_another_way():
    for row in tasks.core_rows('world_story_schema', 60):
        place = re.search(r'is in the (\w+)\.$', row['continuation'])[1]
        assert [follow(c) == place for c in row['context_options']].index(True) == row['gold']
        assert sum(follow(c) == place for c in row['context_options']) == 1
    for row in tasks.core_rows('world_story', 60):
        text = row['context'].split(' Where is')[0]
        assert follow(text) + '.' == row['continuation'] and text.count('.') == 7
    asked = {(q, f.value) for f in world.FACTS for q in world.wordings(f, exam=True)}
    for row in tasks.core_rows('world_fact_schema', 60):
        questions = [c[len('Question: '):-len('\nAnswer: It is')] for c in row['context_options']]
        assert [(q, row['continuation'][:-1]) in asked for q in questions] == [n == row['gold'] for n in range(2)]

@pytest.mark.skipif('NANOCHAT_SHARED_DATA' not in os.environ, reason='NANOCHAT_SHARED_DATA names no folder with the CORE bundle')
def test_the_layout_of_the_real_bundle(tmp_path):
    "The same files, columns, task fields and row fields as the bundle that DCLM gives out"
    import tarfile
    with tarfile.open(Path(os.environ['NANOCHAT_SHARED_DATA'])/'core/core_small.tar.gz') as tar:
        names = [m.name for m in tar.getmembers() if m.name.endswith(('core.yaml', 'eval_meta_data.csv', '.jsonl'))]
        real = {n.split('/', 1)[1] if n.split('/')[0] not in ('core.yaml', 'eval_data', 'eval_meta_data.csv') else n: tar.extractfile(n).read().decode() for n in names}
    ours = tasks.write_core(tmp_path, n=5)
    assert (ours/'eval_meta_data.csv').read_text().splitlines()[0] == real['eval_meta_data.csv'].splitlines()[0].strip()
    (tmp_path/'real.yaml').write_text(real['core.yaml'])
    listed, mine = read_list(tmp_path/'real.yaml'), read_list(ours/'core.yaml')
    assert {k for t in mine for k in t} <= {k for t in listed for k in t} and {t['icl_task_type'] for t in mine} == {t['icl_task_type'] for t in listed}
    for t in listed:
        row = json.loads(real['eval_data/' + t['dataset_uri']].splitlines()[0])
        assert FIELDS[t['icl_task_type']] <= set(row), t['label']

# chats, preferences

def test_chat_tasks_judge_themselves():
    for exam in (True, False):
        for q in tasks.chat_tasks(300, seed=2, exam=exam):
            check_conversation({'messages': q.messages}, complete=False)
            assert q.right(q.answer) and not q.right('') and not any(q.right(w) for w in q.wrong)
            assert q.categorical == (q.kind in ('letters', 'multiple choice'))
            if q.categorical: assert q.value in q.options and all(o in q.messages[-1]['content'] for o in q.options)

def test_sft_conversations():
    chats = tasks.sft_conversations(2000, seed=5)
    for n, c in enumerate(chats): check_conversation(c, f'conversation {n}')
    calls = [(a['text'], b['text']) for c in chats for m in c['messages'] if isinstance(m['content'], list)
             for a, b in zip(m['content'], m['content'][1:]) if a['type'] == 'python']
    assert len(calls) > 300 and all(run_tool(a) == b for a, b in calls)              # training agrees with the calculator
    assert {c['kind'] for c in chats} == set(tasks.SFT_MIX) and max(len(c['messages']) for c in chats) >= 8
    assert any(m['role'] == 'system' for c in chats for m in c['messages'])
    only = tasks.sft_conversations(50, mix={'refusal': 1, 'identity': 2}, name='Ida', maker='Bo')
    assert {c['kind'] for c in only} == {'refusal', 'identity'} and 'nanochat' not in json.dumps(only)
    assert tasks.sft_conversation(7, seed=5) == chats[7]

def test_preferences():
    pairs = tasks.preferences(1000, seed=2)
    assert {p.reason for p in pairs} == set(tasks.REASONS)
    true = {world.fill(world.RELATIONS[f.relation].reply, f) for f in world.FACTS}
    for p in pairs:
        assert p.chosen != p.rejected and p.prompt[-1]['role'] == 'user'
        for reply in (p.chosen, p.rejected): check_conversation({'messages': [*p.prompt, reply]})
        if p.reason in ('wrong fact', 'invents'): assert p.rejected['content'] not in true
        if p.reason == 'answers another question': assert p.rejected['content'] in true
        if p.reason == 'ignores the tool':
            call, output, text = p.chosen['content']
            assert run_tool(call['text']) == output['text'] and eval(p.rejected['content'].replace('/', '//').replace('=', '!=')[:-1])

# nothing leaks

@pytest.fixture(scope='module')
def training():
    "Everything that may be trained on, with seeds of its own"
    return {'documents': [d.text for d in world.documents(5000, seed=11)], 'conversations': world.conversations(4000, seed=11),
            'sft': tasks.sft_conversations(3000, seed=11), 'preferences': tasks.preferences(1500, seed=11), 'problems': tasks.problems(2000, seed=11),
            'programs': tasks.programs(800, seed=11), 'chat tasks': tasks.chat_tasks(800, seed=11, exam=False)}

EXAMS = {'exam': lambda: world.evaluation(seed=12), 'problems': lambda: tasks.problems(300, 12, exam=True), 'programs': lambda: tasks.programs(150, 12, exam=True),
         'preferences': lambda: tasks.preferences(150, 12, exam=True), 'chat tasks': lambda: tasks.chat_tasks(300, 12), 'sft': lambda: tasks.sft_conversations(200, 12, exam=True),
         **{label: lambda label=label: tasks.core_rows(label, 60, 12) for label in tasks.CORE_TASKS}}

@pytest.mark.parametrize('name', EXAMS)
def test_no_exam_item_is_trained_on(name, training):
    items = EXAMS[name]()
    for where, train in training.items(): assert tasks.leaked(items, train) == [], where
    planted = [*training['documents'][:50], 'He asks: ' + tasks.shown(items[0])[0] + ' Nobody knows.']
    assert items[0] in tasks.leaked(items, planted)

def test_no_sum_of_the_exam_is_computed_in_training(training):
    "In any wording: by what is sent to the calculator, and by what a document says"
    text = json.dumps([plain(t) for where, t in training.items() if where not in ('problems', 'programs')])
    assert not {(p.kind, p.key) for p in training['problems']} & {(p.kind, p.key) for p in tasks.problems(500, 12, exam=True)}
    trained = set(re.findall(r'(?<![\d.])\d+ [-+*/] \d+(?![\d.])', text))
    exam = {p.expression for p in tasks.problems(500, 12, exam=True) if p.kind == 'sum'} | {r['context'][:-2] for r in tasks.core_rows('world_sums', 80, 12)}
    assert len(exam) > 150 and trained & exam == set()

# files

def test_sets_as_files(tmp_path):
    "Every set can be written as lines of JSON; fine-tuning reads conversations of ours from such a file as it reads anybody's"
    from nanochat.scripts.chat_sft import read_conversations
    for name in ('problems', 'programs', 'chat tasks', 'preferences', 'sft', 'core'):
        tasks.write_jsonl(tmp_path/f'{name}.jsonl', SETS[name]()[:20])
        rows = [json.loads(l) for l in (tmp_path/f'{name}.jsonl').read_text(encoding='utf-8').splitlines()]
        assert len(rows) == 20 and all(isinstance(r, dict) for r in rows), name
    assert [c['messages'] for c in read_conversations(tmp_path/'sft.jsonl')] == [c['messages'] for c in tasks.sft_conversations(20)]

# errors

@pytest.mark.parametrize('call, says', [
    (lambda: tasks.core_rows('hellaswag', 3), 'there is no task hellaswag: the tasks are world_facts'),
    (lambda: tasks.core_rows('world_sums', 2000), r'core 0 world_sums: 2000 were asked for, and there are only about \d+ different ones'),
    (lambda: tasks.problems(5, levels=(0,)), 'there is no level'), (lambda: tasks.problems(5, levels=()), 'there is no level'),
    (lambda: tasks.programs(5, levels=(9,)), 'no program has a level'), (lambda: tasks.preferences(5, reasons=('ugly',)), 'there is no reason'),
    (lambda: tasks.chat_tasks(5, kinds=('poems',)), 'there is no kind of chat task'), (lambda: tasks.sft_conversation(0, mix={}), 'there is no kind of conversation')])
def test_what_cannot_be_had_is_said(call, says):
    with pytest.raises(UserError, match=says): call()

@pytest.mark.parametrize('make', [lambda n: tasks.problems(n, 9), lambda n: tasks.programs(n, 9), lambda n: tasks.preferences(n, 9), lambda n: tasks.chat_tasks(n, 9),
                                  lambda n: tasks.core_rows('world_facts', n, 9), lambda n: tasks.sft_conversations(n, 9)])
def test_any_size_and_more_begins_with_less(make):
    assert make(0) == [] and make(1) == make(40)[:1] and make(20) == make(40)[:20] and len(make(40)) == 40

if __name__ == '__main__':      # the golden line, to be copied into this file when a set is changed on purpose
    print('GOLDEN =', {k: digest(make()) for k, make in SETS.items()})
