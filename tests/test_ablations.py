"The stored ablations are those of tools/ablate.py: every variant, every seed, the same settings, and models of the size that they would have today"
import json, math, runpy
import pytest, torch
from conftest import ROOT
from nanochat.gpt import GPT, GPTConfig
from nanochat.scaling import gpt_config, recipe

FILE = json.loads((ROOT/'nbs/ablations.json').read_text(encoding='utf-8'))
TOOL = runpy.run_path(str(ROOT/'tools/ablate.py'))
SEEDS = 3

def defaults(monkeypatch, tmp_path):
    "The settings that the tool has without arguments, caught when it writes its file"
    class Written(Exception): pass
    def caught(path, content): raise Written(content)
    main = TOOL['main']
    class Tok: hash = 'none'
    replace = dict(write_json=caught, one_run=lambda *a: dict(bpb=0.), sha256_file=lambda p: 'none',
                   Tokenizer=type('T', (), dict(load=staticmethod(lambda p: Tok))))
    for name, value in replace.items(): monkeypatch.setitem(main.__globals__, name, value)
    monkeypatch.setattr('sys.argv', ['ablate.py', '--out', str(tmp_path/'out.json')])
    threads = torch.get_num_threads()
    with pytest.raises(Written) as e: main()
    torch.set_num_threads(threads)
    return e.value.args[0]

def test_settings_are_those_of_the_tool(monkeypatch, tmp_path):
    assert json.loads(json.dumps(defaults(monkeypatch, tmp_path)['settings'])) == FILE['settings']

def test_every_variant_has_every_seed_once():
    wanted = sorted((name, seed) for name in TOOL['VARIANTS'] for seed in range(SEEDS))
    assert sorted((r['name'], r['seed']) for r in FILE['runs']) == wanted

def test_every_variant_was_timed():
    assert set(FILE['step_ratios']) == set(TOOL['VARIANTS'])
    assert all(len(xs) >= 16 and all(.2 < x < 5 for x in xs) for xs in FILE['step_ratios'].values())

def test_numbers_are_sound():
    for r in FILE['runs']: assert all(math.isfinite(r[k]) and r[k] > 0 for k in ('bpb', 'train_loss', 'seconds')), r
    assert FILE['environment']['commit'] and FILE['environment']['threads'] == 1
    assert all(len(FILE['text'][k]) == 64 for k in ('data_sha256', 'tokenizer'))

@pytest.mark.parametrize('name', TOOL['VARIANTS'])
def test_the_models_of_today_have_the_sizes_of_the_runs(name):
    s = FILE['settings']
    r = recipe(s['depth'], 1024, s['max_len'], tokens=s['tokens'], batch_tokens=s['batch_tokens'])
    with torch.device('meta'): model = GPT(GPTConfig(**{**gpt_config(r).to_dict(), **s['variants'][name]}))
    assert {x['params'] for x in FILE['runs'] if x['name'] == name} == {model.num_params()['total']}

def test_the_text_is_that_of_the_small_run(small_run):
    "By its tokenizer; the hash of the shards also depends on the version of pyarrow. If this fails, the file has to be made again"
    from nanochat.tokenizer import Tokenizer
    assert FILE['text']['tokenizer'] == Tokenizer.load(small_run/'tokenizer/small').hash

def test_other_settings_are_refused(tmp_path, monkeypatch, small_run):
    "The tool does not mix runs of two kinds in one file"
    out = tmp_path/'out.json'
    out.write_text(json.dumps({**FILE, 'settings': {**FILE['settings'], 'depth': 3}}))
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(small_run))
    monkeypatch.setattr('sys.argv', ['ablate.py', '--out', str(out)])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match='other settings'): runpy.run_path(str(ROOT/'tools/ablate.py'))['main']()
    torch.set_num_threads(threads)

@pytest.mark.slow
def test_a_run_can_be_made_again(small_run, monkeypatch):
    "Twenty seconds; another machine rounds otherwise, so the number may differ in the third digit"
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(small_run))
    s, threads = FILE['settings'], torch.get_num_threads()
    torch.set_num_threads(1)
    out = TOOL['one_run'](s['variants']['only smear'], 1, s['depth'], s['tokens'], s['max_len'], s['data'])
    torch.set_num_threads(threads)
    was = next(r for r in FILE['runs'] if r['name'] == 'only smear' and r['seed'] == 1)
    assert abs(out['bpb'] - was['bpb']) < .01
