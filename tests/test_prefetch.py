"The prefetching loader: the same batches, the state of the batch last taken, pinned memory in turns, and a thread that always ends"
import gc, itertools, json, subprocess, sys, threading, time
import pytest
import torch
from nanochat import tinyworld
from nanochat.conversation import render
from nanochat.dataloader import Batch, ChatLoader, PretrainLoader
from nanochat.dataset import write_shards
from nanochat.prefetch import Prefetch, _Pinned, _Plain, prefetch
from nanochat.tokenizer import Tokenizer
from nanochat.tokens import tokenize_shards

TOK = Tokenizer({bytes([b]): b for b in range(256)})

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('data')/'world'
    texts = [d.text for d in tinyworld.documents(400)]
    write_shards(d, texts[100:], texts[:100], rows_per_group=64)
    tokenize_shards(d, TOK)
    return d

def make(folder, **kw): return PretrainLoader(folder, 'train', TOK, 2, 64, buffer=40, **kw)
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b))
def threads(): return [t for t in threading.enumerate() if t.name == 'prefetch']

def test_batches_state_and_ledger_are_those_of_the_plain_loader(folder):
    plain, ahead = make(folder), prefetch(make(folder))
    assert ahead.state_dict() == plain.state_dict()
    for _ in range(40):
        assert same(next(plain), next(ahead))
        time.sleep(0)
        assert ahead.state_dict() == plain.state_dict() and ahead.ledger == plain.ledger
    ahead.close()

def test_the_state_is_of_the_batch_taken_not_of_those_made(folder):
    ahead = prefetch(make(folder), ahead=5)
    for _ in range(3): next(ahead)
    while len(ahead.box.things) < 5: time.sleep(.001)                       # the thread is five batches ahead
    state, rest = json.loads(json.dumps(ahead.state_dict())), [next(ahead) for _ in range(12)]
    other = prefetch(make(folder)); other.load_state_dict(state)
    assert all(same(next(other), b) for b in rest)
    plain = make(folder); plain.load_state_dict(state)
    assert all(same(next(plain), b) for b in rest)
    ahead.load_state_dict(state)                                             # back, in the loader that is at work
    assert all(same(next(ahead), b) for b in rest)
    for p in (ahead, other): p.close()

def test_close_goes_back_to_the_batch_last_taken(folder):
    plain, ahead = make(folder), prefetch(make(folder))
    for _ in range(4): assert same(next(plain), next(ahead))
    ahead.close(); ahead.close()
    assert not threads() and ahead.loader.state_dict() == plain.state_dict()
    assert all(same(next(plain), next(ahead)) for _ in range(4))
    ahead.close()

def test_an_epoch_ends_and_stays_ended(folder):
    plain, ahead = list(make(folder, epochs=1)), prefetch(make(folder, epochs=1))
    assert all(same(*p) for p in itertools.zip_longest(plain, ahead))
    for _ in range(2):
        with pytest.raises(StopIteration): next(ahead)
    chats = [render(TOK, c) for c in tinyworld.conversations(20)]
    one, two = ChatLoader(chats, TOK, 2, 600, epochs=1), prefetch(ChatLoader(chats, TOK, 2, 600, epochs=1))
    assert two.left_out == one.left_out and all(same(*p) for p in itertools.zip_longest(one, two)) and one.ledger == two.ledger

class Broken:
    "Three batches, then an error"
    def __init__(self): self.n = 0
    def place(self): return self.n
    def __next__(self):
        self.n += 1
        if self.n > 3: raise OSError('the disk is gone')
        return Batch(*[torch.tensor([self.n])]*4)

def test_an_error_of_the_thread_reaches_the_caller_in_its_turn():
    ahead = Prefetch(Broken())
    assert [int(next(ahead).inputs) for _ in range(3)] == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(OSError, match='the disk is gone'): next(ahead)

def test_the_thread_ends_when_the_loader_is_forgotten(folder):
    ahead = prefetch(make(folder)); next(ahead)
    thread = ahead.box and threads()[-1]
    del ahead; gc.collect()
    thread.join(60)
    assert not thread.is_alive()

@pytest.mark.parametrize('ending, code', [('pass', 0), ('raise KeyboardInterrupt', 130)])
def test_a_program_ends_while_the_thread_is_at_work(folder, ending, code):
    program = f"""
from nanochat.dataloader import PretrainLoader
from nanochat.prefetch import prefetch
from nanochat.tokenizer import Tokenizer
loader = prefetch(PretrainLoader({str(folder)!r}, 'train', Tokenizer({{bytes([b]): b for b in range(256)}}), 2, 64))
next(loader)
{ending}"""
    run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=300)
    assert run.returncode in (code, -2 if code == 130 else code), run.stderr
    assert 'terminate' not in run.stderr and 'Fatal' not in run.stderr


# --- the way to a GPU, with a recorder in the place of CUDA

class FakeCuda:
    "Writes down what would happen, and finishes a copy only when somebody waits for it"
    def __init__(self): self.log, self.pending = [], []
    def Stream(self, device=None): return 'side'
    def stream(self, s):
        import contextlib
        return contextlib.nullcontext()
    def current_stream(self, device=None):
        fake = self
        class Now:
            def wait_event(self, e): e.synchronize(); fake.log.append('wait')
        return Now()
    def Event(self):
        fake = self
        class E:
            def record(self, stream): self.todo, fake.pending = fake.pending, []; assert stream == 'side'
            def synchronize(self):
                for there, source in self.todo: there.copy_(source)
                self.todo = []
        return E()

class LateTensor(torch.Tensor):
    "Pinned memory whose `.to` copies when the event is waited for, as a real asynchronous copy may"
    fake = None
    def to(self, device, non_blocking=False):
        assert non_blocking and device.type == 'cuda' and self.is_fake_pinned
        there = torch.full_like(torch.Tensor.as_subclass(self, torch.Tensor), 99 if self.dtype != torch.bool else True)
        LateTensor.fake.pending.append((there, torch.Tensor.as_subclass(self, torch.Tensor)))
        there.record_stream = lambda s: None
        return there

@pytest.fixture
def hand():
    fake = LateTensor.fake = FakeCuda()
    made = []
    def pinned(t):
        slot = torch.empty_like(t).as_subclass(LateTensor); slot.is_fake_pinned = True; made.append(slot)
        return slot
    h = _Pinned(torch.device('cuda:0'), cuda=fake, pinned=pinned)
    h.made = made
    return h

def test_batches_for_a_gpu_go_through_two_pinned_slots_and_are_never_torn(folder, hand):
    "The source is pinned, a slot is not written before its copy is over, and the reader waits for the copy"
    plain, other = make(folder), make(folder)
    waiting = [hand.send(next(other)) for _ in range(2)]
    for _ in range(20):
        assert same(next(plain), hand.receive(waiting.pop(0)))
        waiting.append(hand.send(next(other)))
    assert len(hand.made) == 2*4                                              # two slots of four tensors, for all batches

def test_a_smaller_last_batch_gets_slots_of_its_own(folder, hand):
    plain = list(make(folder, epochs=1))
    for b in plain: assert same(b, hand.receive(hand.send(b)))

def test_the_hand_is_chosen_by_the_type_of_the_device(monkeypatch, folder):
    "torch.device('cuda:0') == 'cuda' is False, so equality must not decide"
    import nanochat.prefetch as module
    chosen = []
    class Spy(_Plain):
        def __init__(self, device): super().__init__(torch.device('cpu')); chosen.append(device)
    monkeypatch.setattr(module, '_Pinned', Spy)
    for device in ('cuda:0', torch.device('cuda', 1)):
        ahead = prefetch(make(folder), device); next(ahead); ahead.close()
    assert chosen == [torch.device('cuda:0'), torch.device('cuda:1')]
    ahead = prefetch(make(folder), 'cpu'); next(ahead); ahead.close()
    assert len(chosen) == 2

@pytest.mark.cuda
def test_on_a_gpu_accumulated_sums_are_those_of_the_plain_loader(folder):
    if not torch.cuda.is_available(): pytest.skip('no GPU on this machine')
    plain, ahead = make(folder), prefetch(make(folder), 'cuda:0')
    for _ in range(200):
        b, want = next(ahead), next(plain)
        assert b.inputs.device.type == 'cuda' and ahead.hand.slots[0][0][0].is_pinned()
        torch.cuda._sleep(200_000)                                            # the GPU is behind: copies run early
        assert same([t.cpu() for t in b], want)
    assert ahead.state_dict() == plain.state_dict()
    ahead.close()
