"The graders of lesson 03: solutions pass, what is handed out does not, likely mistakes are named; and what the lesson measures is so"
import nbformat, pytest, torch
from test_lessons import ROOT, changed, exercises, solution as folded
from nanochat.gpt import GPT, GPTConfig

LESSON = ROOT/'lessons/03_attention.ipynb'
CELLS = {c['id']: c.source for c in nbformat.read(LESSON, 4).cells}

@pytest.fixture(scope='module')
def scope():
    "What the exercises find in the notebook: its imports and tools, and a small model in which every head matters"
    scope = {}
    for name in ('setup', 'weights', 'attending', 'look'): exec(CELLS[name], scope)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=80, n_layer=2, n_head=2, n_kv_head=2, head_dim=8, max_len=32, smear=True, smear_channels=8))
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p)/p.shape[-1]**.5)
    return {**scope, 'model': model}

def solution(number): return folded(exercises(LESSON)[number])

def grade(scope, number, answer):
    "What the grader of an exercise says to `answer`"
    e, scope = exercises(LESSON)[number], dict(scope)
    *lines, last = e['grader'].splitlines()
    exec('\n'.join([e['yours'], CELLS[f'exercise-{number}-truth'], *lines, answer]), scope)      # the first two hold tools
    return eval(last, scope)

@pytest.mark.parametrize('number', [1, 2, 3])
def test_solutions_are_right_and_what_is_handed_out_is_not(scope, number):
    assert grade(scope, number, '') != 'right'
    assert grade(scope, number, solution(number)) == 'right'

@pytest.mark.parametrize('old, new, says', [
    ('return see if window is None else see & (back <= window)', 'return (see if window is None else see & (back <= window)).T', 'exchanged'),
    ('(back >= 0)', '(back > 0)', 'see itself'),
    ('back <= window', 'back < max(1, window)', 'keeps 4 keys'),
    (' & (docs[:, None] == docs)', '', 'another document'),
    ('return see if window is None else see & (back <= window)', 'return see', 'the window is forgotten'),
    ('(back >= 0) & ', '', 'ahead'),
    ('see = (back >= 0)', 'see = (back >= 0).float()*(docs[:, None] == docs); return see; see = (back >= 0)', 'tensor of bool')])
def test_mistakes_in_the_mask_are_named(scope, old, new, says): assert says in grade(scope, 1, changed(solution(1), old, new))

@pytest.mark.parametrize('line, new, says', [
    ('place = torch.tensor([t])', 'place = torch.tensor([prompt])', 'stand at the same place'),
    ('place = torch.tensor([t])', 'place = torch.tensor([t - prompt])', 'count from 0 again'),
    ('place = torch.tensor([t])', 'place = torch.tensor([t + 1]) % len(cos)', 'gap'),
    ('turn(k[t:t+1], place)', 'turn(k[t:t+1], torch.tensor([prompt]))', 'their keys do not'),
    ('turn(q[t:t+1], place)', 'turn(q[t:t+1], torch.tensor([prompt]))', 'their queries do not'),
    ('place = torch.tensor([t])', 'place = torch.tensor([t - 1])', 'last one of the prompt'),
    ('place = torch.tensor([t])', 'place = torch.tensor([len(q) - t])', 'wrong from token'),
    ('return torch.cat(out)', 'return torch.cat(out)[1:]', 'should be of shape')])
def test_mistakes_in_decoding_are_named(scope, line, new, says):
    answer = changed(solution(2), line, new)
    if says == 'gap': answer = changed(answer, 'rotary_tables(len(q),', 'rotary_tables(len(q) + 1,')
    assert says in grade(scope, 2, answer)

def test_one_place_too_high_everywhere_is_no_mistake(scope):
    "Only distances count, and the grader knows that"
    answer = changed(changed(solution(2), 'rotary_tables(len(q),', 'rotary_tables(len(q) + 7,'), 'place = torch.tensor([t])', 'place = torch.tensor([t + 7])')
    assert grade(scope, 2, answer.replace('torch.arange(prompt)', '(torch.arange(prompt) + 7)')) == 'right'

def test_the_bug_shows_after_position_1_and_not_before(scope):
    "Prompt of one token: places 0 and 1 are right, all later ones are not"
    scope = dict(scope)
    exec(exercises(LESSON)[2]['yours'], scope)
    buggy = scope['decode']
    exec(solution(2), scope)
    q, k, v = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1)) * 2
    off = (buggy(q, k, v, 1) - scope['decode'](q, k, v, 1)).abs().amax(1)
    assert off[:2].max() < 1e-6 and off[2:].min() > 1e-3

@pytest.mark.parametrize('old, new, says', [
    ('y[..., head*D:head*D + D] = 0', 'y[:] = 0', 'all heads of the layer'),
    ('    finally: hook.remove()', '    finally: pass', 'damaged for good'),
    ('return next_nats(model, ids)', 'return -next_nats(model, ids)', 'log-probabilities'),
    ('return next_nats(model, ids)', 'return next_nats(model, ids).mean()', 'one number for each'),
    ('        return y,', '        return None', 'nothing changed')])
def test_mistakes_in_silencing_are_named(scope, old, new, says): assert says in grade(scope, 3, changed(solution(3), old, new))

BY_WEIGHT = '''
def without(model, ids, layer, head):
    twin, D = copy.deepcopy(model), model.cfg.head_dim
    with torch.no_grad():
        {cut}
    return next_nats(twin, ids)'''
FROZEN = '''
def without(model, ids, layer, head):
    maps = look(model, ids[:, :-1])[0].clone()
    maps[:, layer, head] = 0
    with torch.inference_mode(): return F.cross_entropy(model.logits(with_maps(model, ids[:, :-1], maps))[0], ids[0, 1:], reduction='none')'''

@pytest.mark.parametrize('answer, says', [
    (BY_WEIGHT.format(cut='twin.blocks[layer].attn.c_proj.weight[:, head*D:head*D + D] = 0'), 'right'),
    (BY_WEIGHT.format(cut='twin.blocks[layer].attn.c_proj.weight[head*D:head*D + D] = 0'), 'rows of c_proj'),
    (BY_WEIGHT.format(cut='for b in twin.blocks: b.attn.c_proj.weight[:, head*D:head*D + D] = 0'), 'in every layer'),
    (FROZEN, 'maps must be made anew')])
def test_other_ways_to_silence_a_head_are_judged(scope, answer, says): assert says in grade(scope, 3, answer)

def test_the_true_map_is_accepted_and_the_colleagues_is_not(scope):
    "On another model than the lesson's: the test of a map is the model's own output"
    scope = dict(scope)
    exec(CELLS['colleague-maps'], scope)
    model, ids = scope['model'], torch.randint(0, 80, (2, 20), generator=torch.Generator().manual_seed(0))
    maps, own = scope['look'](model, ids)
    with torch.inference_mode(): torch.testing.assert_close(own, model(ids), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scope['with_maps'](model, ids, maps), own, atol=1e-4, rtol=1e-4)
    assert (scope['with_maps'](model, ids, scope['colleague'](model, ids)) - own).norm() > .1*own.norm()

def test_the_second_layer_carries_the_answers(scope, small_run, monkeypatch):
    "Exercise 3 on the trained model: what its solution says"
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(small_run))
    from nanochat.checkpoint import load_model
    model, tok, _ = load_model('base', 'small')
    scope = {**scope, 'model': model, 'tok': tok}
    exec(CELLS['told'] + '\nfacts = [t for f in random.Random(0).sample(FACTS, 60) if (t := told(f))]\n' + exercises(LESSON)[3]['yours'] + '\n' + solution(3), scope)
    answer, other = zip(*scope['carried'](model, scope['facts']).values())
    assert max(answer[2:]) > max(answer[:2]) and sum(answer[2:]) > sum(answer[:2]), answer
    assert sum(answer[2:]) > sum(other[2:]), (answer, other)
