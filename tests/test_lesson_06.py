"The graders of lesson 06: solutions pass, what is handed out does not, wrong diagnoses meet the evidence against them; and the stored runs are those of the tool"
import copy, importlib.util, itertools, json, math, re, statistics, time, types
from collections import Counter
import nbformat, pytest, torch
from test_lessons import ROOT, changed, exercises, solution as folded
from nanochat.gpt import GPT, GPTConfig
from nanochat.head import lm_loss
from nanochat.optim import MuonAdamW
from nanochat.record import read_metrics, series
from nanochat.tinyworld import documents
from nanochat.tokenizer import train_bpe

PATH = ROOT/'lessons/06_training_run.ipynb'
LESSON = exercises(PATH)
CELLS = {c['id']: c.source for c in nbformat.read(PATH, 4).cells}
STORED = json.loads((ROOT/'lessons/broken_runs.json').read_text())

pytestmark = pytest.mark.usefixtures('one_thread')

def tool():
    spec = importlib.util.spec_from_file_location('broken_runs', ROOT/'tools/broken_runs.py')
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module

@pytest.fixture(scope='module')
def doctor():
    "What the lesson has defined by the time of its exercises"
    s = dict(math=math, statistics=statistics, itertools=itertools, Counter=Counter, series=series, torch=torch, stored=STORED, reference=STORED['reference'], marks=STORED['marks'],
             V=STORED['vocab_size'], floor=STORED['marks']['entropy of the corpus'], cases={int(n): r for n, r in STORED['cases'].items()},
             diagnosis={}, GPT=GPT, GPTConfig=GPTConfig, lm_loss=lm_loss, MuonAdamW=MuonAdamW, documents=documents, train_bpe=train_bpe)
    for cell in ('speed', 'measure', 'evidence', 'signs', 'feedback', 'exercise-2-given', 'exercise-2-spec', 'exercise-3-given', 'exercise-1-spec'): exec(CELLS[cell], s)
    return s

NAMES = ['healthy', 'rate too high', 'rate too low', 'repeated text', 'leak', 'gradient kept', 'slow loader', 'half masked', 'too few steps']

@pytest.mark.parametrize('part, seed', [('cases', 0), ('held_out', 1)])
def test_the_record_contradicts_every_diagnosis_but_the_right_one(doctor, part, seed):
    truth = tool().names(seed)
    assert STORED[part].keys() == truth.keys() and sorted(truth.values()) == sorted(tool().CASES)
    for n, r in STORED[part].items():
        for name in NAMES:
            against = doctor['contradictions'](name, r)
            assert (against == []) == (name == truth[n]), (n, name, against)
            assert all(re.search(r'\d', s) for s in against)                     # with the number that says so

def test_the_folded_answers_are_the_truth(doctor, capsys):
    told = dict(re.findall(r'<summary>Case (\d)</summary>`([^`]+)`', CELLS['answers']))
    assert told == tool().names(0)
    doctor['feedback']({int(n): name for n, name in told.items()} | {1: ...})
    said = capsys.readouterr().out
    assert said.count('nothing in the record speaks against it') == 6 and 'case 1: no diagnosis yet' in said
    doctor['feedback']({1: 'flu', 2: 'slow loader'})
    assert "'flu' is not in the table" in (said := capsys.readouterr().out) and 'case 2: not slow loader, since its steps wait for data' in said

def test_what_the_answers_say_of_the_cases(doctor):
    case, floor, well = {int(n): r for n, r in STORED['cases'].items()}, doctor['floor'], STORED['reference']
    speed = [statistics.median(r['tokens_per_s']) for r in (case[1], case[6])]
    assert case[1]['loss'] == case[6]['loss'] and case[1]['grad_norm'] == case[6]['grad_norm'] and .5 < speed[0] / speed[1] < .7
    assert statistics.fmean(case[2]['loss'][-10:]) < floor / 50 and max(case[3]['loss'][:10]) > 2 * math.log(STORED['vocab_size'])
    assert case[4]['grad_norm'][29] < case[4]['grad_norm'][89] < case[4]['grad_norm'][149]
    val = series(case[5], 'val_loss')[1]
    assert min(val) == val[1] and val[-1] > val[1] + 1 and case[5]['loss'][-1] < floor / 5
    cliff = next(s for s, l in enumerate(well['loss']) if l < STORED['marks']['unigram entropy'])
    assert case[7]['loss'][cliff] > 6.8 and case[7]['grad_norm'][-1] > 2 * well['grad_norm'][-1]

def test_every_name_of_the_table_can_be_diagnosed(doctor):
    assert re.findall(r'^\| `([a-z ]+)` \|', CELLS['diseases'], re.M) == NAMES
    r = copy.deepcopy(STORED['reference'])
    r['tokens'] = [t // 2 for t in r['tokens']]
    assert not doctor['contradictions']('half masked', r)
    short = {k: v[:60] for k, v in STORED['reference'].items()}
    assert not doctor['contradictions']('too few steps', short)

def test_the_stored_runs_are_anonymous_and_small():
    text = (ROOT/'lessons/broken_runs.json').read_text()
    assert len(text) < 200_000 and not any(name in text for name in NAMES)
    for r in (STORED['reference'], *STORED['cases'].values(), *STORED['held_out'].values()):
        assert {len(v) for v in r.values()} == {150} and r['step'] == list(range(1, 151)) and r['tokens'][-1] == 150 * 1024
        assert abs(r['loss'][0] - math.log(STORED['vocab_size'])) < 0.01

def test_the_tool_breaks_what_it_says(tmp_path, monkeypatch, doctor):
    "A few steps of each fault, on other data: made by the real loop, stored in the same columns"
    import nanochat.scripts.data as scripts_data
    from nanochat.scripts.tok_train import tok_train
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path))
    monkeypatch.setattr('nanochat.checkpoint.environment', lambda *a: {}); monkeypatch.setattr('nanochat.record.environment', lambda *a: {})
    t = tool()
    monkeypatch.setattr('nanochat.train.time', types.SimpleNamespace(perf_counter=time.process_time))       # as the tool's main does
    scripts_data.prepare('tinyworld', name='small', docs=300, val_docs=20)
    tok_train(data='small', tag='small', vocab_size=512)
    monkeypatch.setattr(t, 'STEPS', 8); monkeypatch.setattr(t, 'BATCH', 256); monkeypatch.setattr(t, 'DEPTH', 1); monkeypatch.setattr(t, 'T', 64)
    got = {name: t.compact(read_metrics(t.one_run(name, 0, tmp_path/name).folder)) for name in ('healthy', 'leak', 'gradient kept', 'repeated text', 'slow loader')}
    assert all(r.keys() == STORED['reference'].keys() for r in got.values())
    assert got['leak']['loss'][-1] < got['healthy']['loss'][-1] and got['slow loader']['loss'] == got['healthy']['loss']
    assert got['gradient kept']['grad_norm'][-1] > 1.5 * got['healthy']['grad_norm'][-1]
    waited = {name: sum(got[name]['data_seconds'][1:]) for name in ('healthy', 'slow loader')}      # the first batch opens files
    assert waited['slow loader'] > 3 * waited['healthy']
    assert got['repeated text']['loss'][6:] != got['healthy']['loss'][6:] and got['repeated text']['loss'][:6] == got['healthy']['loss'][:6]
    t.write(tmp_path/'out.json', dict(cases={'1': got['leak']}))
    assert json.loads((tmp_path/'out.json').read_text()) == dict(cases={'1': got['leak']})

# --- exercises

def verdict(doctor, number, code):
    "What the grader of an exercise says about `code`"
    s = dict(doctor)
    *lines, last = LESSON[number]['grader'].splitlines()
    exec('\n'.join([code, *lines]), s)
    return eval(last, s)

def solution(number): return folded(LESSON[number])

@pytest.mark.parametrize('number', [1, 2, 3])
def test_the_solution_is_right_and_what_is_handed_out_is_not(doctor, number):
    assert verdict(doctor, number, LESSON[number]['yours']) != 'right'
    assert verdict(doctor, number, solution(number)) == 'right'

LEVELS = 'def levels(ids, V):\n    p = [n / len(ids) for n in Counter(ids).values()]\n    return '
ALARM = 'def alarm(r, healthy, floor): '
MISTAKES = [
    (1, 'def levels(ids, V): pass', 'returns nothing'),
    (1, LEVELS + 'math.log2(V), -sum(x * math.log2(x) for x in p)', 'these are bits'),
    (1, LEVELS + 'math.log(V), -sum(math.log(x) for x in p)', 'weight its surprise'),
    (1, LEVELS + 'math.log(V), -sum(math.log(x) for x in p) / len(p)', 'the mean over the kinds'),
    (1, LEVELS + 'math.log(V), sum(x * math.log(x) for x in p)', 'not negative'),
    (1, LEVELS + 'math.log(len(p)), -sum(x * math.log(x) for x in p)', 'does not know which tokens occur'),
    (1, LEVELS + '1., 2.', 'it should be'),
    (1, 'def levels(ids, V): return ()', 'a pair'),
    (1, 'def levels(ids, V): return math.log(V),', 'a pair'),
    (1, 'def levels(ids, V): return math.log(V)', 'a pair'),
    (2, LESSON[2]['yours'], 'both diseases'),
    (2, changed(solution(2), '        optimizer.zero_grad()\n', ''), 'the gradient is still kept'),
    (2, changed(solution(2), 'rows[:, 1:]', 'rows[:, :-1]'), 'the answer still stands'),
    (2, changed(solution(2), 'rows[:, :-1], rows[:, 1:]', 'rows[:, 1:], rows[:, :-1]'), 'the token before'),
    (2, changed(solution(2), '        optimizer.step()\n        optimizer.zero_grad()\n', '        optimizer.zero_grad()\n        optimizer.step()\n'), 'thrown away before'),
    (2, changed(solution(2), 'losses.append(loss.item())', 'losses.append(2 * loss.item())'), 'should be'),
    (2, changed(solution(2), '        losses.append(loss.item())\n', ''), 'one loss for each batch'),
    (3, ALARM + 'pass', '6 of 6 are not noticed'),
    (3, ALARM + "return 'help'", 'false alarm at step 10'),
    (3, ALARM + "return 'floor' if r['loss'][-1] < floor else None", '4 of 6'),
    (3, ALARM + "n = len(r['loss']); return 'loss' if n >= 30 and abs(r['loss'][-1] - healthy['loss'][n - 1]) > .3 else None", 'does not show that'),
    (3, changed(solution(3), "return 'clock'", "return 'it waits'"), 'none of the five words'),
    (3, changed(solution(3), "return 'clock'", "return 'gradient'"), 'its steps wait for data'),
    (3, ALARM + "return 'late' if len(r['loss']) > 140 else None", 'false alarm at step 150'),
    (3, changed(solution(3), "> now(healthy, 'loss') + 0.5", "> now(healthy, 'loss') - 0.5"), 'false alarm'),
]

@pytest.mark.parametrize('number, code, words', MISTAKES)
def test_mistakes_are_named(doctor, number, code, words):
    assert words in verdict(doctor, number, code)

def test_an_answer_in_float32_or_a_list_is_right_too(doctor):
    assert verdict(doctor, 1, changed(solution(1), 'return math.log(V), -sum(p * math.log(p) for p in shares)', 'return [torch.tensor(float(V)).log(), -sum(torch.tensor(p) * torch.tensor(p).log() for p in shares)]')) == 'right'

def test_an_alarm_may_know_less_than_ours(doctor):
    "Text that is learnt by heart shows below the floor too; and one disease may be missed"
    assert verdict(doctor, 3, changed(solution(3), "return 'gap'", "return 'floor'")) == 'right'
    assert verdict(doctor, 3, changed(solution(3), "    if waiting(r) > 0.2: return 'clock'\n", '')) == 'right'

def test_the_signs_are_those_of_the_diseases(doctor):
    want = {'healthy': set(), 'leak': {'floor'}, 'repeated text': {'floor', 'gap'}, 'slow loader': {'clock'}, 'gradient kept': {'gradient', 'loss'}, 'rate too high': {'loss'}, 'rate too low': {'loss'}}
    for part, seed in (('cases', 0), ('held_out', 1)):
        for n, name in tool().names(seed).items(): assert doctor['shown'](STORED[part][n]) == want[name], (part, name)

def test_zeroing_the_gradient_first_is_right_too(doctor):
    first = changed(changed(solution(2), '        optimizer.zero_grad()\n', ''), '        loss.backward()\n', '        optimizer.zero_grad()\n        loss.backward()\n')
    assert verdict(doctor, 2, first) == 'right'
