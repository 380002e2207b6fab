"The graders of lesson 04: solutions pass, what is handed out does not, likely mistakes are named; and what the lesson claims holds for any weights"
import copy, math, random
from contextlib import contextmanager
import nbformat, pytest, torch
from test_lessons import ROOT, exercises, solution as folded
from nanochat.attention import rms_norm
from nanochat.gpt import GPT, Call, GPTConfig

PATH = ROOT/'lessons/04_gpt.ipynb'
LESSON = exercises(PATH)
CELLS = {c['id']: c.source for c in nbformat.read(PATH, 4).cells}

pytestmark = pytest.mark.usefixtures('one_thread')

def scope():
    s = dict(copy=copy, math=math, random=random, contextmanager=contextmanager, torch=torch, rms_norm=rms_norm, GPT=GPT, Call=Call, GPTConfig=GPTConfig)
    exec(CELLS['walk-code'] + '\n' + LESSON[4]['given'], s)
    return s

def verdict(number, code):
    "What the grader of an exercise says about `code`"
    s = scope()
    *lines, last = LESSON[number]['grader'].splitlines()
    exec('\n'.join([CELLS.get(f'exercise-{number}-spec', ''), code, *lines]), s)
    return eval(last, s)

def solution(number): return folded(LESSON[number])

@pytest.mark.parametrize('number', [1, 2, 3, 4])
def test_the_solution_is_right_and_what_is_handed_out_is_not(number):
    assert verdict(number, LESSON[number]['yours']) != 'right'
    assert verdict(number, solution(number)) == 'right'

NORM, REPLACED = 'def norm(x, eps): ', '@contextmanager\ndef replaced(part, new):\n    '
HOOK = 'handle = part.register_forward_hook(lambda module, args, out: new(out))\n    '
MISTAKES = [
    (1, NORM + 'return x / (x.square().mean(-1, keepdim=True).sqrt() + eps)', 'is eps inside the root?'),
    (1, NORM + 'return x / x.square().mean(-1, keepdim=True).sqrt()', 'eps is missing'),
    (1, NORM + 'return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()', 'not their sum'),
    (1, NORM + 'return x / (x.square().mean(-1, keepdim=True) + eps)', 'the root is missing'),
    (1, NORM + 'return x / (x.square().mean() + eps).sqrt()', 'each vector has its own'),
    (1, NORM + 'return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)', 'LayerNorm'),
    (1, NORM + 'return x.square().mean(-1)', 'keepdim=True'),
    (1, NORM + 'return -x', 'it should be'),
    (2, 'def count(cfg): pass', 'returns nothing'),
    (2, solution(2).replace('cfg.padded_vocab * C', 'V * C'), 'padded'),
    (2, solution(2).replace('tables * V * kv', 'tables * V * C'), 'as wide as the values'),
    (2, solution(2).replace('V * C + tables * V * kv', 'V * C'), 'a table of its own'),
    (2, solution(2).replace('L * (10 * C * C + 2 * C * kv)', '12 * C * C * L'), 'keys and values'),
    (2, solution(2).replace('10 * C', '6 * C'), 'two matrices'),
    (2, solution(2).replace('L * (10', '(10'), 'one layer'),
    (2, solution(2).replace('smear_channels + 1', 'smear_channels'), 'a scale of its own'),
    (2, solution(2).replace('2 * L * cfg.layer', 'L * cfg.layer'), 'two factors'),
    (3, 'def replaced(part, new): pass', 'not a context manager'),
    (3, REPLACED + 'yield', 'must give new(out)'),
    (3, REPLACED + HOOK + 'yield', 'took the outer one'),
    (3, REPLACED + HOOK + 'yield\n    handle.remove()', 'after an error inside'),
    (3, REPLACED + HOOK + 'try: yield\n    except BaseException: pass\n    finally: handle.remove()', 'swallowed'),
    (3, REPLACED + 'old = list(part._forward_hooks.items())\n    ' + HOOK + 'try: yield\n    finally:\n        part._forward_hooks.clear()\n'
        '        part._forward_hooks.update(old[1:] if len(old) == 1 else old)', 'not yours'),
    (4, 'def votes(model, ids, target): pass', 'returns nothing'),
    (4, 'def votes(model, ids, target): return {"embedding": 0.}', 'one vote for each'),
    (4, solution(4).replace(' / rms', ''), 'the last norm is missing'),
    (4, 'def votes(model, ids, target): return slow_votes(model, ids, target, scales=False)', 'factors of the layers'),
    (4, solution(4).replace('- model.backout_scale * x', ''), 'backout is missing'),
    (4, solution(4).replace('(x @ model.lm_head.weight[target] / rms)', '(rms_norm(x) @ model.lm_head.weight[target])'), 'norm of its own'),
    (4, solution(4).replace('return {', 'v = {') + '    a, *rest, b = v\n    return {**v, a: v[b], b: v[a]}', 'the sum is right'),
]

@pytest.mark.parametrize('number, code, words', MISTAKES)
def test_mistakes_are_named(number, code, words):
    assert words in verdict(number, code)

def test_the_slow_motion_is_the_model():
    "The walk of the lesson ends where the model's own forward pass ends, at several depths"
    s = scope()
    for layers in (1, 2, 3, 5):
        torch.manual_seed(layers)
        m = GPT(GPTConfig(vocab_size=70, n_layer=layers, n_head=2, n_kv_head=1, head_dim=16, max_len=16, value_embeds=True, layer_scales=True,
                          smear=True, backout=True))
        for p in m.parameters(): torch.nn.init.normal_(p, std=.3)
        ids = torch.randint(0, 70, (2, 11))
        with torch.inference_mode(): torch.testing.assert_close(rms_norm(s['walk'](m, ids)['backout'], m.cfg.norm_eps), m(ids))

def test_backout_is_nothing_with_two_layers_and_something_with_three():
    s = {}
    for layers in (2, 3):
        torch.manual_seed(0)
        m = GPT(GPTConfig(vocab_size=70, n_layer=layers, n_head=2, n_kv_head=2, head_dim=16, max_len=16, backout=True))
        for p in m.parameters(): torch.nn.init.normal_(p, std=.3)
        out = []
        for scale in (0., .5):
            torch.nn.init.constant_(m.backout_scale, scale)
            with torch.inference_mode(): out.append(m(torch.arange(12)[None]))
        s[layers] = (out[0] - out[1]).abs().max()
    assert s[2] < 1e-4 < .01 < s[3]
