"Weights of a NanoChatForCausalLM give its logits in our model; needs the optional package transformers"
import pytest, torch
transformers = pytest.importorskip('transformers', reason='the package transformers is not installed')
from nanochat.gpt import GPT, transformers_config, transformers_weights

@pytest.fixture(scope='module')
def pair():
    torch.manual_seed(0)
    config = transformers.NanoChatConfig(vocab_size=301, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                                         num_key_value_heads=2, max_position_embeddings=96, initializer_range=.2)
    theirs = transformers.NanoChatForCausalLM(config).eval()
    cfg = transformers_config(config.to_dict())
    ours = GPT(cfg).eval()
    ours.load_state_dict(transformers_weights(theirs.state_dict(), cfg))
    return theirs, ours

@torch.inference_mode()
def test_the_same_logits_on_a_hundred_prompts(pair):
    theirs, ours = pair
    for n in range(100):
        ids = torch.randint(0, 301, (1, 1 + n % 96), generator=torch.Generator().manual_seed(n))
        assert (ours.logits(ours(ids)) - theirs(ids).logits).abs().max() < 1e-4

@torch.inference_mode()
def test_the_same_logits_with_a_cache(pair):
    theirs, ours = pair
    ids = torch.randint(0, 301, (2, 40), generator=torch.Generator().manual_seed(7))
    cache, past = ours.new_cache(2), None
    for s in (slice(0, 20), *(slice(t, t + 1) for t in range(20, 40))):
        got = ours.logits(ours(ids[:, s], cache)); cache.advance(s.stop - s.start)
        out = theirs(ids[:, s], past_key_values=past, use_cache=True); past = out.past_key_values
        assert (got - out.logits).abs().max() < 1e-4
