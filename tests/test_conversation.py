"Conversations beyond their page: the tiny world's chats, hostile texts, lengths, what a stopped reply leaves behind."
import copy, gzip, json, os, random
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from nanochat import tinyworld
from nanochat.common import UserError
from nanochat.conversation import (ROLES, Rendered, TooLong, check_conversation, message_text, parse_reply, render, render_all,
                                   render_prompt, show_rendered)
from nanochat.tokenizer import SPECIALS, Tokenizer, train_bpe

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
S = BYTES.special
def user(text): return {'role': 'user', 'content': text}
def assistant(content): return {'role': 'assistant', 'content': content}
def part(kind, text): return {'type': kind, 'text': text}

GOLDEN = {'messages': [user('2*3?'), assistant([part('python', '2*3'), part('python_output', '6'), part('text', 'Six')]), user('ok'), assistant('Bye')]}

TEN = Path(__file__).parent/'golden_conversations.json'
GOLDEN_WORDS = ['th', 'the', ' t', ' the', 'in', 'er', ' a', 'an', ' an', 'is', ' is', '12', ' 12', '\n\n', '    ', 'é', 'start', '_start', 'assistant', '<|']

def golden_tokenizer():
    "Bytes and twenty words: no trainer is involved, so only a change of the rendering can change these ids"
    return Tokenizer({**{bytes([i]): i for i in range(256)}, **{w.encode(): 256 + n for n, w in enumerate(GOLDEN_WORDS)}})

def as_golden(r): return dict(ids=r.ids, mask=''.join(map(str, r.mask)), roles=''.join(map(str, r.roles)), left_out=r.left_out)

def golden_rows():
    with open(TEN, encoding='utf-8') as f: return json.load(f)

@pytest.mark.parametrize('row', golden_rows(), ids=lambda row: row['name'])
def test_ten_golden_conversations(row):
    "On purpose only: `python tests/test_conversation.py` writes the file again"
    tok = golden_tokenizer()
    conv = {'messages': row['messages']}
    assert as_golden(render(tok, conv, row.get('max_len'))) == row['golden']
    assert tok.decode(row['golden']['ids']).encode().decode() == row['text']            # what the ids spell, for a reader of the file

def test_the_golden_file_covers_what_matters():
    rows = golden_rows()
    assert len(rows) == 10 and {int(k) for row in rows for k in row['golden']['roles']} == set(range(len(ROLES)))
    assert any(row['golden']['left_out'] for row in rows)

@pytest.fixture(scope='module')
def world(): return tinyworld.conversations(200, seed=0)

@pytest.fixture(scope='module')
def tok(): return train_bpe((d.text for d in tinyworld.documents(300)), 800)

def test_golden_ids_and_mask():
    "Written as numbers: bytes are their own ids, the specials follow from 256"
    ids, mask = render(BYTES, GOLDEN)[:2]
    assert ids == [256, 259, 50, 42, 51, 63, 260, 261, 263, 50, 42, 51, 264, 265, 54, 266, 83, 105, 120, 262,
                   259, 111, 107, 260, 261, 66, 121, 101, 262]
    assert mask == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]

def test_every_conversation_of_the_world(tok, world):
    for n, conv in enumerate(world):
        check_conversation(conv, f'conversation {n}')
        ids, mask, *_ = render(tok, conv)
        prompt = render_prompt(tok, {**conv, 'messages': conv['messages'][:-1]})
        assert ids[:len(prompt)] == prompt and sum(mask) > 0
        said = parse_reply(tok, ids[len(prompt):])
        assert message_text({'content': said}) == message_text(conv['messages'][-1])

def owner(ids):
    "Who produced each id, from the marks alone: a second way to the mask"
    turn, span = None, None
    for i in ids:
        if i == S('assistant_start'): turn = 'assistant'; yield 0; continue
        if i == S('output_start'): span = 'output'
        yield int(turn == 'assistant' and span is None)
        if i == S('output_end'): span = None
        if i == S('assistant_end'): turn = None

text = st.text(st.characters(exclude_categories=['Cs']), max_size=6) | st.sampled_from(SPECIALS)
parts = st.lists(st.builds(lambda t: [part('text', t)], text) |
                 st.builds(lambda c, o: [part('python', c), part('python_output', o)], text, text), max_size=3).map(lambda g: sum(g, []))
convs = st.builds(lambda s, turns: {'messages': ([{'role': 'system', 'content': s}] if s is not None else []) +
                  [m for q, r in turns for m in (user(q), assistant(r))]}, st.none() | text, st.lists(st.tuples(text, text | parts), min_size=1, max_size=3))

@settings(max_examples=150, deadline=None)
@given(convs)
def test_the_mask_is_what_the_assistant_produces(conv):
    before = copy.deepcopy(conv)
    r = render(BYTES, conv)
    assert r.mask == list(owner(r.ids)) and conv == before              # and nothing was changed

@settings(max_examples=150, deadline=None)
@given(convs)
def test_content_never_becomes_a_mark(conv):
    "The marks that are there are those of the structure, whatever the texts say"
    want = ['<|bos|>']
    for m in conv['messages']:
        c = m['content'] if isinstance(m['content'], list) else []
        tools = [t for p in c if p['type'] != 'text' for t in {'python': ['<|python_start|>', '<|python_end|>'],
                 'python_output': ['<|output_start|>', '<|output_end|>']}[p['type']]]
        want += [f'<|{m["role"]}_start|>', *tools, f'<|{m["role"]}_end|>']
    assert [BYTES.decode([i]) for i in render(BYTES, conv).ids if i in BYTES.special_ids] == want

@settings(max_examples=150, deadline=None)
@given(convs, st.integers(0, 100))
def test_max_len_keeps_whole_exchanges(conv, n):
    system = conv['messages'][0]['role'] == 'system'
    cuts = [render(BYTES, {'messages': conv['messages'][:k]}) for k in range(2 + system, len(conv['messages']) + 1, 2)]
    fitting = [c for c in cuts if len(c.ids) <= n]
    if fitting:
        r, k = render(BYTES, conv, max_len=n), len(fitting)
        assert r[:3] == fitting[-1][:3] and len(r.ids) <= n
        assert r.left_out == len(conv['messages']) - (2 * k + system)
    else:
        with pytest.raises(TooLong, match='first exchange'): render(BYTES, conv, max_len=n)

@settings(max_examples=60, deadline=None)
@given(st.lists(convs, max_size=5), st.integers(20, 90))
def test_what_is_left_out_is_counted(many, n):
    out, counts = render_all(BYTES, many, n)
    total, kept = sum(len(c['messages']) for c in many), sum(is_start(i) for r in out for i in r.ids)
    assert counts == dict(conversations=len(many), shortened=sum(r.left_out > 0 for r in out), too_long=len(many) - len(out),
                          messages=total, messages_left_out=total - kept)

def is_start(i): return i in (S('system_start'), S('user_start'), S('assistant_start'))

@pytest.mark.parametrize('max_len', [64, 4096])
def test_lengths(max_len):
    conv = {'messages': [m for _ in range(300) for m in GOLDEN['messages']]}
    r = render(BYTES, conv, max_len=max_len)
    assert max_len - 30 < len(r.ids) <= max_len and r.ids[-1] == S('assistant_end') and len(r.mask) == len(r.roles) == len(r.ids)
    assert r.left_out + sum(is_start(i) for i in r.ids) == 1200
    assert r.ids.count(S('python_start')) == r.ids.count(S('output_end'))

def test_any_ids_are_a_reply_that_can_be_used_again():
    "A model may emit anything, and a person may stop it anywhere: the parts that remain can be rendered"
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.choice([*BYTES.special_ids, 97, 195]) for _ in range(rng.randrange(8))]
        conv = {'messages': [user('a'), assistant(parse_reply(BYTES, ids)), user('b')]}
        prompt = render_prompt(BYTES, conv)
        assert parse_reply(BYTES, prompt[prompt.index(S('assistant_start')) + 1:]) == conv['messages'][1]['content']

def test_a_stopped_reply_can_be_answered():
    said = parse_reply(BYTES, [*b'So', S('python_start'), *b'1+'])
    conv = {'messages': [user('a'), assistant(said), user('b')]}
    assert render_prompt(BYTES, conv)[-1] == S('assistant_start')

@pytest.mark.parametrize('messages, says', [
    (None, 'must be a list'), ([], 'must be a list'), ('Hi', 'must be a list'), ([user('a')], 'must be of assistant'),
    ([user('a'), assistant('b'), user('c')], 'must be of assistant'), ([assistant('a')], r'message 1 \(assistant\)'),
    ([user('a'), assistant('b'), {'role': 'system', 'content': 'c'}], r'message 3 \(system\)'),
    ([{'role': 'system', 'content': 'a'}], 'must be of assistant'), ([{'role': 'tool', 'content': 'a'}], r'message 1 \(tool\)'),
    ([user(None)], 'must be a string'), (['Hi'], 'message 1: a message is'), ([{'content': 'a'}], 'message 1: a message is'),
    ([user('a'), assistant([{'type': 'text'}])], 'part 1: text must be'), ([user('a'), assistant(['b'])], 'part 1: the type'),
    ([user('a'), assistant([part('python', '1'), part('python', '2')])], 'part 2'),
    ([user('a'), assistant([part('python', '1'), part('python_output', '1'), part('python_output', '1')])], 'part 3')])
def test_what_is_wrong_is_named(messages, says):
    with pytest.raises(UserError, match=f'^chats.jsonl line 7.*{says}'): check_conversation({'messages': messages}, 'chats.jsonl line 7')
    with pytest.raises(UserError): render(BYTES, {'messages': messages})

@pytest.mark.parametrize('conv', [None, [], 'Hi', {}])
def test_what_is_no_conversation(conv):
    with pytest.raises(UserError, match='"messages" must be a list'): check_conversation(conv)

@pytest.mark.parametrize('complete', [True, False])
def test_errors_name_the_conversation_and_the_turn(complete):
    bad = {'messages': [user('a'), assistant('b'), user(3)] + [assistant('c')] * complete}
    for f in (lambda: render(BYTES, bad, where='chats.jsonl line 7'), lambda: render_prompt(BYTES, bad, complete, 'chats.jsonl line 7')):
        with pytest.raises(UserError, match=r'^chats.jsonl line 7, message 3 \(user\): content must be a string'): f()
    with pytest.raises(UserError, match=r'^row 2, message 3 \(user\)'): render_all(BYTES, [GOLDEN, bad], where='row')

@settings(max_examples=150, deadline=None)
@given(convs)
def test_a_task_and_a_chat_have_the_same_prompt(conv):
    prompt = render_prompt(BYTES, conv, drop_reply=True)
    assert prompt == render_prompt(BYTES, {'messages': conv['messages'][:-1]}) == render(BYTES, conv).ids[:len(prompt)]
    with pytest.raises(UserError, match='must be of user'): render_prompt(BYTES, conv)

def test_ids_and_a_mask_are_still_enough():
    assert Rendered([1, 2], [0, 1]) == Rendered(ids=[1, 2], mask=[0, 1], roles=(), left_out=0)
    assert '[' in repr(show_rendered(BYTES, Rendered([256, 72], [0, 1])))

def test_the_view_obeys_no_html():
    view = show_rendered(BYTES, render(BYTES, {'messages': [user('<script>alert(1)</script>'), assistant('<img src=x>')]}))
    assert '<script' not in view._repr_html_() and '<img' not in view._repr_html_()

@pytest.mark.skipif('NANOCHAT_SHARED_DATA' not in os.environ, reason='NANOCHAT_SHARED_DATA names no folder with real chats')
def test_real_chats_do_not_end_a_run(tok):
    "300 real preference prompts with their answers, some far longer than a row: every one is rendered, shortened or counted"
    rows = json.loads(gzip.decompress((Path(os.environ['NANOCHAT_SHARED_DATA'])/'dpo/dpo_en_demo.json.gz').read_bytes()))
    role = {'system': 'system', 'human': 'user', 'gpt': 'assistant'}
    chats = [{'messages': [{'role': role[m['from']], 'content': m['value']} for m in [*row['conversations'], row['chosen']]]} for row in rows]
    whole, counts = render_all(tok, chats)
    assert len(whole) == 300 and counts['messages_left_out'] == 0
    short, counts = render_all(tok, chats, 512)
    assert len(short) + counts['too_long'] == 300 and counts['too_long'] > 0 and counts['shortened'] > 0
    assert all(len(r.ids) <= 512 and r.ids[-1] == tok.special('assistant_end') for r in short)

if __name__ == '__main__':      # writes the golden file again: only when the rendering is changed on purpose
    rows = golden_rows()
    for row in rows:
        tok, r = golden_tokenizer(), None
        r = render(tok, {'messages': row['messages']}, row.get('max_len'))
        row.update(text=tok.decode(r.ids), golden=as_golden(r))
    body = ',\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
    TEN.write_text(f'[{body}]\n', encoding='utf-8')
