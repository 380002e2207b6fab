"What base_train says, refuses and records, beside training itself"
import json, shutil
from functools import partial
import pytest, torch
from conftest import MICRO, result, script
from nanochat.common import UserError, run_dir
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import make_optimizer
from nanochat.precision import set_precision
from nanochat.record import Run, read_metrics, read_result, series
from nanochat.scaling import recipe, share_of_rank
from nanochat.scripts.base_train import base_train, evaluator, rehearse
from nanochat.scripts.chat_sft import chat_sft
from nanochat.tokenizer import Tokenizer
from nanochat.train import Loop, cut

def test_a_dry_run_plans_and_writes_nothing(micro):
    out = script('base_train', *MICRO, '--tag', 'dry', '--dry-run', base=micro)
    assert out.returncode == 0, out.stderr
    p = result(out)
    assert p['steps'] == 40 and p['fits'] and 'memory' in out.stdout and not (micro/'base'/'dry').exists()

def test_a_dry_run_of_several_processes_plans_the_rows_of_one(micro, monkeypatch, capsys):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(micro))
    r, source, cpu = recipe(4, 2048), run_dir('data', 'micro'), torch.device('cpu')
    alone = rehearse(r, source, run_dir('base', 'dry'), cpu, 'fp32')
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2).items(): monkeypatch.setenv(name, str(value))
    p = rehearse(r, source, run_dir('base', 'dry'), cpu, 'fp32')
    assert (p['device_batch'], p['grad_accum']) == share_of_rank(r, 2) != (alone['device_batch'], alone['grad_accum']) == share_of_rank(r, 1)
    assert all('--tag dry' in line for line in p['commands'][-2:])
    monkeypatch.setattr('nanochat.scripts.base_train.plan', lambda *a, **kw: {**p, 'fits': False, 'rows_that_fit': 1})
    with pytest.raises(UserError, match=f'holds 1 rows, not {p["device_batch"]}: pass --device-batch 1'): rehearse(r, source, run_dir('base', 'dry'), cpu, 'fp32')

KEPT = dict(depth=1, max_len=64, steps=4, batch_tokens=1024, data='micro', tag='micro', eval_tokens=500, device='cpu')

@pytest.mark.parametrize('world, change, says', [(1, dict(attention='nonsense'), '--attention nonsense is no kernel'), (1, dict(attention='varlen'), 'needs a CUDA device'),
    (1, dict(eval_tokens=0), '--eval-tokens 0 is no whole number'), (3, {}, 'cannot be divided among 3 processes')])
def test_what_force_cannot_replace_is_not_thrown_away(micro, monkeypatch, world, change, says):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(micro))
    before = base_train(**KEPT)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=world).items(): monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=says): base_train(**{**KEPT, **change}, force=True)
    assert read_result(micro/'base'/'micro') == before

def test_what_force_cannot_fine_tune_is_not_thrown_away(micro, monkeypatch, tmp_path):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(micro))
    base_train(**KEPT)
    turns = [dict(role='user', content='Please ' * 500), dict(role='assistant', content='No.')]
    (tmp_path/'long.jsonl').write_text((json.dumps(dict(messages=turns)) + '\n') * 4)
    again = partial(chat_sft, 'micro', n=100, batch_tokens=1024, device='cpu')
    before = again()
    with pytest.raises(UserError, match='--attention nonsense is no kernel'): again(force=True, attention='nonsense')
    with pytest.raises(UserError, match='conversations can be used'): again(force=True, data=str(tmp_path/'long.jsonl'))
    assert read_result(micro/'sft'/'micro') == before

def test_a_dry_run_finds_damaged_data(micro, tmp_path):
    shutil.copytree(micro, tmp_path/'base')
    shard = next((tmp_path/'base'/'data'/'micro').glob('*.parquet'))
    data = bytearray(shard.read_bytes()); data[len(data)//2] ^= 1; shard.write_bytes(data)
    out = script('base_train', *MICRO, '--tag', 'dry', '--dry-run', base=tmp_path/'base')
    assert out.returncode == 1 and shard.name in out.stderr and 'damaged' in out.stderr

@pytest.mark.parametrize('flags, says', [(['--precision', 'bf16'], '--precision bf16 is not native on cpu: choose auto or one of fp32'),
    (['--attention', 'varlen'], 'needs a CUDA device'), (['--on-bad', 'pray'], '--on-bad pray is none of skip, stop, rollback'),
    (['--eval-tokens', '0'], '--eval-tokens 0 is no whole number of 1 or more')])
def test_what_cannot_be_is_said_before_anything_is_written(micro, flags, says):
    out = script('base_train', *MICRO, '--tag', 'odd', '--device', 'cpu', *flags, base=micro)
    assert out.returncode == 1 and says in out.stderr and 'Traceback' not in out.stderr
    assert not list(micro.glob('base/*odd*'))                                # no folder, and no lock beside it

# --- the tokens of a validation

def test_the_tokens_of_a_validation_do_not_depend_on_rows_or_processes(micro, monkeypatch):
    "The first of the split, the same at every step, ten times as many at the last one; the processes share them"
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(micro))
    source, tok = run_dir('data', 'micro'), Tokenizer.load(run_dir('tokenizer', 'micro'))
    rows = []
    def note(model, batches, sizes):
        for b in batches: rows.extend(torch.cat([b.inputs, b.targets], 1).tolist())
        return dict(bpb=1., nats=1., tokens=300)
    monkeypatch.setattr('nanochat.scripts.base_train.bits_per_byte', note)
    def seen(step, world=1, B=8):
        rows.clear()
        for rank in range(world):
            for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world).items(): monkeypatch.setenv(name, str(value))
            evaluator(None, source, tok, recipe(1, tok.n_vocab, 64, steps=9, device_batch=B), 300)(step)
        return sorted(rows)
    first, last = seen(1), seen(9)
    graded = lambda rows: sum(t >= 0 for row in rows for t in row[64:])
    assert (graded(first), graded(last)) == (300, 3000)
    for world, B in ((1, 1), (2, 8), (3, 2), (4, 64)): assert (seen(1, world, B), seen(5, world, B), seen(9, world, B)) == (first, first, last)

def test_the_tokens_of_a_validation_stay_with_a_run(micro, monkeypatch):
    "Interrupted and gone on with, it measures what a run that nobody disturbed measures; another number is refused"
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(micro))
    asked = dict(KEPT, tokenizer='micro', steps=6, eval_tokens=300, eval_every=2, save_every=2)
    def stop(step, metrics):
        if step == 5: raise ZeroDivisionError
    straight = base_train(**{**asked, 'tag': 'measured'})
    with pytest.raises(ZeroDivisionError): base_train(**{**asked, 'tag': 'measured2'}, on_step=stop)
    with pytest.raises(UserError, match='eval_tokens was 300, now 400'): base_train(**{**asked, 'tag': 'measured2', 'eval_tokens': 400})
    again = base_train(**{**asked, 'tag': 'measured2'})
    a, b = (series(read_metrics(micro/'base'/tag), 'val_bpb') for tag in ('measured', 'measured2'))
    assert a == b and a[0] == [2, 4, 6] and again['val_bpb'] == straight['val_bpb'] == a[1][-1]
    assert json.loads((micro/'base/measured/config.json').read_text())['eval_tokens'] == 300

def test_a_validation_split_that_is_too_small_is_read_whole_and_said(micro, monkeypatch, capsys):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(micro))
    whole = base_train(**{**KEPT, 'tokenizer': 'micro', 'tag': 'whole', 'eval_every': 2, 'eval_tokens': 10**6})
    said = [line for line in capsys.readouterr().err.splitlines() if 'fewer than --eval-tokens 1,000,000: all are read' in line]
    assert len(said) == 1 and len(set(series(read_metrics(micro/'base/whole'), 'val_bpb')[1])) == 2
    assert base_train(**{**KEPT, 'tokenizer': 'micro', 'tag': 'tenfold', 'eval_tokens': 1000})['val_bpb'] == whole['val_bpb']       # ten times 1000 is more than there is
    assert 'fewer than' not in capsys.readouterr().err

def test_the_result_says_what_computed(micro):
    out = result(script('base_train', *MICRO, '--tag', 'said', base=micro))
    assert (out['precision'], out['attention'], out['processes'], out['device']) == ('fp32', 'slices', 1, 'cpu')
    lines = [json.loads(line) for line in (micro/'base'/'said'/'metrics.jsonl').read_text().splitlines()]
    assert all(0 < r['mfu'] < 2 for r in lines if 'loss' in r)

class Counting:
    "Rows that count upwards; knows where it is"
    n = 0
    def __next__(self):
        self.n += 1
        ids = (torch.randint(50, (4, 1), generator=torch.Generator().manual_seed(self.n)) + torch.arange(17)) % 50
        return Batch(ids[:, :-1], ids[:, 1:].clone(), torch.zeros(4, 16, dtype=torch.long))
    def state_dict(self): return {'n': self.n}
    def load_state_dict(self, d): self.n = d['n']

def loop(folder, precision):
    r = recipe(1, 64, max_len=64, steps=12)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, head_dim=16, max_len=64))
    set_precision(model, precision)
    return Loop(model, make_optimizer(model, r), Counting(), r, Run(folder, {}), ('toy', 'hash'))

def test_float16_goes_on_with_the_same_scale_and_the_same_weights(tmp_path):
    straight = loop(tmp_path/'a', 'fp16')
    straight.scaler.scale = 2.**32                                         # far too large: the first steps overflow, and it settles
    for _ in range(12): straight.one_step()
    first = loop(tmp_path/'b', 'fp16')
    first.scaler.scale = 2.**32
    for _ in range(5): first.one_step()
    assert first.scaler.scale < 2.**32
    first.save()
    again = loop(tmp_path/'b', 'fp16')
    assert again.step == 5 and again.scaler.state_dict() == first.scaler.state_dict()
    for _ in range(7): again.one_step()
    assert again.scaler.state_dict() == straight.scaler.state_dict()
    assert all(torch.equal(p, q) for p, q in zip(straight.model.parameters(), again.model.parameters()))

@pytest.mark.parametrize('pieces', [1, 2, 3, 4, 9])
def test_cut_keeps_every_row(pieces):
    batches = [next(Counting()), next(Counting())]
    rows = lambda bs: sorted(r.tolist() for b in bs for r in torch.cat([b.inputs, b.targets, b.docs], 1))
    assert rows(cut(batches, pieces)) == rows(batches) and len(cut(batches, pieces)) == 2*min(pieces, 4)

@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='compiling on a CPU needs g++')
def test_compiled_blocks_train_as_eager_ones(micro):
    eager, fast = (result(script('base_train', *MICRO, '--tag', f'c{len(flag)}', *flag, base=micro)) for flag in ([], ['--compiled']))
    assert abs(fast['val_bpb'] / eager['val_bpb'] - 1) < 1e-2

def test_every_number_of_the_dial_and_every_look_from_the_command_line(micro):
    out = result(script('base_train', *MICRO, '--tag', 'dialled', '--dial', 'mask_docs=true,clip_norm=0.5,adam_betas=[0.7,0.9]', '--sample-every', '15',
                        '--save-every', '5', '--keep', '0', base=micro))
    asked = json.loads((micro/'base'/'dialled'/'config.json').read_text())['recipe']
    assert (asked['mask_docs'], asked['clip_norm'], asked['adam_betas']) == (True, .5, [.7, .9])
    assert set(asked['by_hand']) >= {'mask_docs', 'clip_norm', 'adam_betas'}
    lines = [json.loads(line) for line in (micro/'base'/'dialled'/'metrics.jsonl').read_text().splitlines()]
    assert [r['step'] for r in lines if 'samples' in r] == [15, 30, 40] and out['samples'] == lines[-1]['samples'] and len(out['samples']) == 3
    assert all(0 <= r['data_seconds'] * r['tokens_per_s'] <= 1024 for r in lines if 'loss' in r)           # waiting is a share of the step
    assert len(list((micro/'base'/'dialled'/'checkpoints').glob('step-*'))) == 8

@pytest.mark.parametrize('flags, says', [(['--dial', 'clip=1'], "no setting 'clip': did you mean clip_norm?"), (['--dial', 'deep'], "'deep' is not name=value"),
    (['--dial', 'depth=6'], '--dial depth: not a setting of the dial; use the flag of that name'), (['--dial', 'vocab_size=9'], '--dial vocab_size: not a setting'),
    (['--dial', 'hooks=9'], '--dial hooks: not a setting'), (['--flops', '1e9'], 'Give one of steps and flops'), (['--dial', 'clip_norm=-1'], 'clip_norm must be 0 or more')])
def test_a_dial_that_cannot_be(micro, flags, says):
    out = script('base_train', *MICRO, '--tag', 'odd', *flags, base=micro)
    assert out.returncode == 1 and says in out.stderr and 'Traceback' not in out.stderr

@pytest.mark.slow
def test_the_best_checkpoint_is_what_best_loads(micro):
    assert script('base_train', *MICRO, '--tag', 'judged', '--eval-every', '10', '--save-every', '10', base=micro).returncode == 0
    step = lambda path: int(path.name[5:])
    scores = {step(p.parent): json.loads(p.read_text())['score'] for p in (micro/'base'/'judged'/'checkpoints').glob('step-*/manifest.json')}
    out = result(script('base_eval', '--tag', 'judged', '--step', 'best', '--tokens', '2000', '--samples', '0', base=micro))
    assert out['step'] == min(scores, key=scores.get) and all(s is not None for s in scores.values())
