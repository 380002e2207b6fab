"The graders of lesson 07: solutions pass, what is handed out does not, likely mistakes are named"
import nbformat, pytest, torch
from test_lessons import ROOT, changed, exercises, solution as folded

LESSON = ROOT/'lessons/07_checkpoints.ipynb'
CELLS = {c['id']: c.source for c in nbformat.read(LESSON, 4).cells}

@pytest.fixture(scope='module')
def scope():
    "What the exercises find in the notebook: its imports, its loop, a checkpoint at step 30 and the records of the resumed runs"
    threads, scope = torch.get_num_threads(), {}
    for name in ('setup', 'forget-data', 'forget-loop', 'forget-save', 'forget-run', 'exercise-1-disk', 'exercise-1-worlds', 'exercise-2-counter', 'exercise-3-cases'): exec(CELLS[name], scope)
    yield scope
    torch.set_num_threads(threads)

def solution(number): return folded(exercises(LESSON)[number])

def grade(scope, number, answer):
    "What the grader of an exercise says to `answer`"
    e, scope = exercises(LESSON)[number], dict(scope)
    *lines, last = e['grader'].splitlines()
    exec('\n'.join([e['yours'], *lines, answer]), scope)
    return eval(last, scope)

@pytest.mark.parametrize('number', [1, 2, 3])
def test_solutions_are_right_and_what_is_handed_out_is_not(scope, number):
    assert grade(scope, number, '') != 'right'
    assert grade(scope, number, solution(number)) == 'right'

@pytest.mark.parametrize('old, new, says', [
    ("    disk.sync('state.tmp')\n", '', 'was the new file on the disk before it got the name'),
    ("    disk.sync_folder()\n", '', 'the new *name* was not on the disk'),
    ("disk.write('state.tmp', text)", "disk.write('state.tmp', 'old')", 'does not hold the new text'),
    ("    disk.sync('state.tmp')\n    disk.rename('state.tmp', 'state')\n", "    disk.rename('state.tmp', 'state')\n    disk.sync('state')\n", 'was the new file on the disk'),
    ("    disk.rename('state.tmp', 'state')\n", "    disk.rename('state', 'state.old')\n    disk.rename('state.tmp', 'state')\n", 'the name was gone for a moment'),
    ("disk.rename('state.tmp', 'state')", "disk.rename('state.new', 'state')", 'renamed a file that is not there'),
    ("disk.write('state.tmp', text)", "disk.write('state', text); disk.write('state.tmp', text)", 'written over the old file')])
def test_mistakes_on_the_disk_are_named(scope, old, new, says): assert says in grade(scope, 1, changed(solution(1), old, new))

def test_nothing_asked_is_named(scope): assert 'nothing was asked' in grade(scope, 1, 'def safe_save(disk, text): pass')

@pytest.mark.parametrize('old, new, says', [
    ("return {'at': self.used}", "return {'at': self.source.at}", 'batches are never seen'),
    (", state['at'], []", ", state['at'], self.ready", 'throw them away'),
    ("return {'at': self.used}", "return {'at': self.source.at - len(self.ready)}", 'a position is no number of batches'),
    ("len(self.ready) < self.depth + 1", "len(self.ready) < 1", 'no batch is prepared in advance'),
    ("return {'at': self.used}", "self.ready = []; return {'at': self.used}", 'asking for the state changed'),
    ("return {'at': self.used}", "return {'at': {self.used}}", 'JSON'),
    ("return {'at': self.used}", "return {'at': max(0, self.used - 1)}", 'after resuming came')])
def test_mistakes_in_the_loader_are_named(scope, old, new, says): assert says in grade(scope, 2, changed(solution(2), old, new))

def test_a_loader_that_does_nothing_in_advance_is_no_repair(scope):
    plain = """class Ahead:
    def __init__(self, source, depth): self.source = source
    def __next__(self): return next(self.source)
    def state_dict(self): return {'at': self.source.at}
    def load_state_dict(self, state): self.source.at = state['at']"""
    assert 'no batch is prepared in advance' in grade(scope, 2, plain)

def test_preparing_after_a_batch_is_handed_out_is_right_too(scope):
    early = """class Ahead:
    def __init__(self, source, depth): self.source, self.depth = source, depth; self.load_state_dict({'at': source.at})
    def one(self): return next(self.source), self.source.at
    def __next__(self):
        batch, self.used = self.ready.pop(0) if self.ready else self.one()
        while len(self.ready) < self.depth: self.ready.append(self.one())
        return batch
    def state_dict(self): return {'at': self.used}
    def load_state_dict(self, state): self.source.at = self.used = state['at']; self.ready = []"""
    assert grade(scope, 2, early) == 'right'

@pytest.mark.parametrize('old, new, says', [
    ("    if not same('batch'): found.add('loader')\n", '', 'Look at the batches'),
    ("    if not same('rate'): found.add('step')\n", '', 'Look at the learning rates'),
    ("if same('batch') and not same('loss', slice(1))", "if not same('loss', slice(1))", 'is that a proof?'),
    ("    if same('batch') and not same('loss', slice(1)): found.add('random')\n", '', 'its loss is not'),
    ("    if not found and not same('loss'): found.add('optimizer')\n", '', 'the first loss agrees, the second does not'),
    ("if not found and not same('loss')", "if not same('loss')", 'Something else explains'),
    ("found = set()", "found = []; return found", 'a set of names')])
def test_mistakes_in_the_diagnosis_are_named(scope, old, new, says): assert says in grade(scope, 3, changed(solution(3), old, new))

def test_resuming_from_everything_is_equal_and_the_first_loss_tells_the_kinds_apart(scope):
    rest, records = scope['rest'], scope['records']
    assert records['nothing'] == rest
    exec(CELLS['forget-check'], dict(scope))
    assert len(rest) == 30 and all(r['loss'] == r['loss'] for r in rest)
