"""Text encoders: what all of them guarantee, and that the built-in one is the same everywhere."""

import pytest
import torch
from pipelines import make_t5
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BartConfig, BartModel, BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5Model

from lvdm.text import TransformersEncoder, WordHashEncoder, load_text_encoder
from odvae.utils.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[END]", "red", "blue", "circle", "square"]
SIZES = {
    "t5": lambda: T5Model(T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    "bert": lambda: BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, intermediate_size=16)),
    "bart": lambda: BartModel(BartConfig(vocab_size=len(WORDS), d_model=16, encoder_layers=1, decoder_layers=1,
                                         encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                                         decoder_ffn_dim=16, pad_token_id=0, eos_token_id=2)),
}


def save_tiny_model(folder, family: str, *, end: bool = True) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]",
                            model_max_length=8).save_pretrained(folder)
    torch.manual_seed(0)
    SIZES[family]().save_pretrained(folder)


@pytest.fixture(scope="module", params=["word hash", *SIZES])
def encoder(request, tmp_path_factory):
    if request.param == "word hash":
        return load_text_encoder()
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder, request.param)
    return load_text_encoder(folder)


def test_guarantees_of_every_encoder(encoder):
    captions = ["", "red circle", "circle red", "red"]
    embeds, mask = encoder.encode(captions)
    assert embeds.shape == (4, 3, encoder.dim) and embeds.dtype == torch.float32  # the longest: two words and a mark
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [1, 3, 3, 2]
    assert embeds.isfinite().all() and not embeds.requires_grad
    assert (embeds[1] - embeds[2]).abs().max() > 1e-2  # order matters
    for i, caption in enumerate(captions):  # the rest of the batch does not
        alone, alone_mask = encoder.encode([caption])
        assert alone_mask.all()
        torch.testing.assert_close(embeds[i, mask[i]], alone[0], atol=1e-5, rtol=1e-4)


def test_long_captions_are_truncated(encoder):
    embeds, mask = encoder.encode(["red circle " * 300])
    assert mask.all() and embeds.shape[1] in (8, 64)


def test_word_hash_is_the_same_in_every_process_and_release():
    golden = [[[0.478481, 1.005028, 2.233895, -0.112869],
               [1.962388, 0.277803, 1.643445, 2.203953],
               [1.690777, -0.859426, -1.370829, -0.318679]]]  # once computed by another process
    torch.testing.assert_close(WordHashEncoder(dim=4).encode(["rot 円"])[0], torch.tensor(golden), atol=1e-5, rtol=0)


def test_word_hash_words():
    encoder = WordHashEncoder(dim=64)
    same = encoder.encode(["A red-circle", "a RED circle!"])[0]
    assert torch.equal(same[0], same[1])
    other = encoder.encode(["a red circles"])[0]
    assert torch.equal(other[0, :3], same[0, :3]) and not torch.equal(other[0, 3], same[0, 3])
    red, blue = WordHashEncoder(dim=1024).encode(["red", "blue"])[0][:, 1]
    assert (red - blue).square().mean().item() == pytest.approx(2, abs=0.3)  # of unit size, nearly orthogonal
    assert encoder.fingerprint != WordHashEncoder(dim=64, seed=1).fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_word_hash_saved_and_loaded(tmp_path, dtype):
    encoder = WordHashEncoder(dim=32, seed=3)
    encoder.save_pretrained(tmp_path)
    for loaded in (load_text_encoder(tmp_path), WordHashEncoder.from_pretrained(tmp_path, torch_dtype=dtype)):
        assert torch.equal(loaded.encode(["a b"])[0], encoder.encode(["a b"])[0])
        assert loaded.fingerprint == encoder.fingerprint


def test_transformers_fingerprint_follows_the_weights(tmp_path):
    save_tiny_model(tmp_path / "a", "t5")
    first, again = (TransformersEncoder.from_pretrained(tmp_path / "a") for _ in range(2))
    (tmp_path / "a").rename(tmp_path / "b")
    assert first.fingerprint == again.fingerprint == load_text_encoder(tmp_path / "b").fingerprint
    changed = load_text_encoder(tmp_path / "b")
    next(changed.model.parameters()).data += 1
    assert changed.fingerprint != first.fingerprint


def test_tokenizer_without_special_tokens_takes_the_empty_caption(tmp_path):
    save_tiny_model(tmp_path, "t5", end=False)
    for captions in ([""], ["", "red circle"]):
        embeds, mask = load_text_encoder(tmp_path).encode(captions)
        assert mask.any(1).all() and embeds.isfinite().all()


@pytest.mark.parametrize("kind", ["built-in", "t5"])
def test_truncated_captions_are_logged_and_counted(kind, tmp_path, caplog):
    save_tiny_model(tmp_path, "t5")
    encoder = WordHashEncoder(dim=8, max_tokens=4) if kind == "built-in" else load_text_encoder(tmp_path)
    encoder.max_tokens = 4
    fits, long = "red red circle", "red circle red circle red"  # with the token at the begin or the end, 4 and 6
    encoder.encode([fits])
    assert not caplog.text and encoder.num_truncated == 0
    _, mask = encoder.encode([fits, long, long + " circle"])
    assert mask.sum(1).tolist() == [4, 4, 4] and encoder.num_truncated == 2
    unit = "3 words" if kind == "built-in" else "4 tokens"
    assert f"2 of 3 captions truncated to {unit}: {long} ..." in caplog.text
    assert "sequence length" not in caplog.text  # transformers' own


def test_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot load a text encoder from .*nothing"):
        load_text_encoder(tmp_path / "nothing")


def test_fingerprint_depends_on_the_tokenizers_rules():
    """The weights and the vocabulary are the same; encoding, which sets padding and truncation, changes nothing."""
    plain, lower = make_t5(), make_t5()
    before = plain.fingerprint
    lower.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    plain.encode(["red", "red blue"])
    assert TransformersEncoder(plain.model, plain.tokenizer).fingerprint == before == make_t5().fingerprint
    assert lower.fingerprint != before and not lower.encode(["RED"])[0].equal(plain.encode(["RED"])[0])
