"A file of preference pairs survives crashes, many writers, second thoughts and full disks"
import json, os, random, warnings
import pytest
from nanochat import preferences
from nanochat.common import UserError
from nanochat.preferences import append_pair, check_pair, read_pairs
from nanochat.worldtasks import preferences as made_pairs

def pair(n=0, chosen='yes', rejected='no'):
    say = lambda role, content: {'role': role, 'content': content}
    return {'prompt': [say('user', f'q{n} \ud800 \n')], 'chosen': say('assistant', chosen), 'rejected': say('assistant', rejected)}

def quiet(path):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return read_pairs(path)

@pytest.mark.parametrize('seed', range(3))
def test_whatever_is_torn_no_whole_pair_is_lost(tmp_path, seed):
    "Random appends and crashes: what was written whole is what is read, in order"
    dice, path, whole = random.Random(seed), tmp_path/'p.jsonl', []
    for n in range(60):
        if dice.random() < .3:
            line = json.dumps(pair(n)).encode() + b'\n'
            with open(path, 'ab') as f: f.write((b'\n' if path.stat().st_size and path.read_bytes()[-1:] != b'\n' else b'') + line[:dice.randrange(len(line) - 1)])
        else: append_pair(path, pair(n)); whole.append(pair(n))
    assert quiet(path) == whole

def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path/'p.jsonl'
    append_pair(path, pair(1))
    class Full:
        def __init__(self, f): self.f = f
        def __getattr__(self, name): return getattr(self.f, name)
        def __enter__(self): return self
        def __exit__(self, *args): self.f.close()
        def write(self, line): return self.f.write(line[:10])
    monkeypatch.setattr(preferences, 'open', lambda *a, **k: Full(open(*a, **k)), raising=False)
    with pytest.raises(UserError, match='the disk is full'): append_pair(path, pair(2))
    monkeypatch.undo()
    append_pair(path, pair(3))
    assert read_pairs(path) == [pair(1), pair(3)]

def test_a_lock_that_never_opens_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, 'try_lock', lambda f: False)
    monkeypatch.setattr(preferences._append, '__defaults__', (0.05,))
    with pytest.raises(UserError, match='another program holds it'): append_pair(tmp_path/'p.jsonl', pair())
    assert (tmp_path/'p.jsonl').read_bytes() == b''

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks are of Unix')
def test_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences._append, '__defaults__', (120.,))                    # a disk may be slow, and the lock is not handed out in turn
    def child(name):
        if pid := os.fork(): return pid
        try:
            for i in range(20): append_pair(tmp_path/'p.jsonl', pair(f'{name}{i}', 'yes'*500))
        finally: os._exit(0)
    for pid in [child(name) for name in 'abc']: os.waitpid(pid, 0)
    assert sorted(map(str, read_pairs(tmp_path/'p.jsonl'))) == sorted(str(pair(f'{c}{i}', 'yes'*500)) for c in 'abc' for i in range(20))

def test_the_last_verdict_counts(tmp_path):
    path = tmp_path/'p.jsonl'
    for p in (pair(1), pair(2), pair(1, 'no', 'yes'), pair(1), pair(1, 'no', 'yes')): append_pair(path, p)
    assert read_pairs(path) == [pair(1, 'no', 'yes'), pair(2)]
    assert len(path.read_text().splitlines()) == 5                    # nothing is ever deleted

@pytest.mark.parametrize('bad', [7, [], {}, {'prompt': 'q', 'chosen': {}, 'rejected': {}}, {**pair(), 'prompt': []}, {**pair(), 'chosen': 'yes'},
                                 {**pair(), 'rejected': pair()['chosen']}, {**pair(), 'prompt': [{'role': 'assistant', 'content': 'x'}]},
                                 {**pair(), 'chosen': {'role': 'assistant', 'content': [{'type': 'python', 'text': '1'}, {'type': 'text', 'text': ''}]}}], ids=range(9))
def test_what_is_no_pair(tmp_path, bad):
    with pytest.raises(UserError): check_pair(bad)
    with pytest.raises(UserError): append_pair(tmp_path/'p.jsonl', bad)
    assert not (tmp_path/'p.jsonl').exists()
    (tmp_path/'p.jsonl').write_text(json.dumps(pair()) + '\n' + json.dumps(bad) + '\n')
    with pytest.raises(UserError, match='line 2'): read_pairs(tmp_path/'p.jsonl')

def test_made_and_clicked_pairs_are_of_one_form(tmp_path):
    made = [p._asdict() for p in made_pairs(30)]
    for p in made: append_pair(tmp_path/'p.jsonl', p)
    assert read_pairs(tmp_path/'p.jsonl') == made

def test_damage_is_warned_about_by_line(tmp_path):
    (tmp_path/'p.jsonl').write_bytes(json.dumps(pair()).encode() + b'\n{"prompt": \n\n\xff\n')
    with pytest.warns(UserWarning) as told: assert read_pairs(tmp_path/'p.jsonl') == [pair()]
    assert [str(w.message).split('p.jsonl ')[1] for w in told] == [f'line {n} is damaged and was left out' for n in (2, 4)]
