"What the small run of the whole pipeline must have come to; runs/test.sh makes it first"
import json, subprocess
from conftest import ROOT, script
from nanochat.dataset import documents
from nanochat.tinyworld import contaminated, conversations, evaluation

def read(base, stage): return json.loads((base/stage/'small/result.json').read_text())

def test_report(small_run):
    card, text = read(small_run, 'report'), (small_run/'report/small/report.md').read_text()
    assert not card['missing'] and card['floor_bpb'] < card['val_bpb'] < 1.6 * card['floor_bpb']
    assert f"{card['val_bpb']:.3f}" in text and '95%' in text

def test_it_has_learned(small_run):
    kinds = read(small_run, 'chat_eval')['kinds']
    assert kinds['facts']['accuracy'] > .5 and kinds['arithmetic']['accuracy'] > .5, kinds

def test_no_exam_question_was_trained_on(small_run):
    "In the very shards and conversations of the run"
    n = json.loads((small_run/'sft/small/config.json').read_text())['n']
    assert contaminated(evaluation(), documents(small_run/'data/small', 'train'), conversations(n)) == []

def test_run_again_skips(small_run):
    before = {s: (small_run/s/'small/result.json').read_bytes() for s in ('base', 'sft', 'chat_eval')}
    r = subprocess.run(['bash', ROOT/'runs/tiny.sh', '--small'], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('already finished') == 5, r.stdout
    assert before == {s: (small_run/s/'small/result.json').read_bytes() for s in before}

SUMS = {'What is 37 * 24?': '888', 'How much is 450 plus 77?': '527', 'Calculate 812 - 95.': '717', 'What is 63 times 12?': '756', 'Compute 388 + 246.': '634'}

def test_calculator_from_python(small_run, monkeypatch):
    "Most of five sums; which one a model of this size misses depends on the rounding of the machine"
    from nanochat.chat import open_chat
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(small_run))
    right = [answer in open_chat(tag='small').answer(question) for question, answer in SUMS.items()]
    assert sum(right) >= 3, right

def test_one_answer_on_the_command_line(small_run):
    r = script('chat_cli', '--tag', 'small', '-p', 'What is 37 * 24?', base=small_run)
    assert r.returncode == 0 and len(r.stdout.strip().splitlines()) == 1 and r.stderr == '', (r.stdout, r.stderr)
