"What the small run of the whole pipeline must have come to; runs/test.sh makes it first"
import json, subprocess
import pytest
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
    r = subprocess.run(['bash', ROOT/'runs/tiny.sh', '--small'], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('already finished') == 5, r.stdout
    assert before == {s: (small_run/s/'small/result.json').read_bytes() for s in before}

@pytest.mark.parametrize('question,answer', [('What is 37 * 24?', '888'), ('How much is 450 plus 77?', '527')])
def test_calculator_on_the_command_line(small_run, question, answer):
    r = script('chat_cli', '--tag', 'small', '-p', question, base=small_run)
    assert r.returncode == 0 and answer in r.stdout, (r.stdout, r.stderr)
