"""Captions to embeddings."""

import sys

import pytest
import torch
from torch.nn.functional import cosine_similarity

from layersync_kernels.errors import ConfigError, DataError
from layersync_kernels.sit.text.hashed import MAX_WORDS, HashedEncoder
from layersync_kernels.sit.text.registry import load_text_encoder

CAPTIONS = ["A man walks forward.", "she jumps", "Walks!"]


def test_hashed_words_are_a_sequence_with_lengths():
    text, lengths = load_text_encoder("hashed").encode(CAPTIONS)
    assert (text.shape, text.dtype, lengths.tolist(), lengths.dtype) == (
        (3, 5, HashedEncoder.width),
        torch.float32,
        [5, 2, 2],
        torch.int64,
    )
    assert not text[1, 2:].any()
    torch.testing.assert_close(text[0].square().mean(-1), torch.ones(5))
    torch.testing.assert_close(text[0, 2], text[2, 0])  # "walks", whatever its case and place


def test_hashed_values_are_the_same_everywhere_and_always():
    text, _ = HashedEncoder().encode(["walk"])
    torch.testing.assert_close(text[0, 0, :4], torch.tensor([1.0415, -0.5208, 1.0415, 1.0415]), atol=1e-3, rtol=0)


def test_hashed_words_of_one_stem_are_alike():
    text, _ = HashedEncoder().encode(["walking jumping turning", "walks jumps turns"])
    likeness = cosine_similarity(text[0][:, None], text[1][None], -1)
    assert likeness.diagonal().mean() > 0.1 + likeness[~torch.eye(3, dtype=torch.bool)].mean()


def test_hashed_captions_without_end_are_cut():
    _, lengths = HashedEncoder().encode(["walk " * 1000])
    assert lengths.tolist() == [MAX_WORDS]


@pytest.mark.parametrize("captions", [["fine", " \t"], [""]])
def test_an_empty_caption_is_refused(captions):
    with pytest.raises(DataError, match=rf"caption {len(captions) - 1} is empty; expected a sentence"):
        HashedEncoder().encode(captions)


def test_no_captions_are_refused():
    with pytest.raises(DataError, match="there are no captions"):
        HashedEncoder().encode([])


@pytest.mark.parametrize("name", ["hash", "transformers/", "t5-small", ""])
def test_unknown_names_say_what_there_is(name):
    with pytest.raises(ConfigError, match="expected hashed or transformers/NAME"):
        load_text_encoder(name)


def test_without_transformers_the_message_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ConfigError, match=r"--text-encoder transformers/x needs a package: .*pip install 'transformers'"
    ):
        load_text_encoder("transformers/x")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of each kind, with random weights."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "a", "man", "walks", "she", "jumps", "forward", ".", "!", "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 10}
    torch.manual_seed(0)
    made = {
        "t5": transformers.T5Model(
            transformers.T5Config(d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=3, **sizes)
        ),
        "clip": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=12,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=3,
                max_position_embeddings=4,
                bos_token_id=10,
                **sizes,
            )
        ),
    }
    folder = tmp_path_factory.mktemp("encoders")
    for name, model in made.items():
        model.save_pretrained(folder / name)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=99
        ).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(("kind", "longest"), [("t5", 5), ("clip", 4)])
def test_published_models_give_their_states(folders, kind, longest):
    encoder = load_text_encoder(f"transformers/{folders / kind}")
    text, lengths = encoder.encode(CAPTIONS)
    assert (text.shape, text.dtype, encoder.width) == ((3, longest, 12), torch.float32, 12)
    assert (lengths.tolist(), lengths.dtype) == ([longest, 2, 2], torch.int64)
    assert not text[1, 2:].any()
    assert not text.requires_grad
    alone, _ = encoder.encode(CAPTIONS[1:2])
    torch.testing.assert_close(text[1, :2], alone[0])


def test_weights_that_are_no_safetensors_are_not_read(folders, tmp_path):
    for file in (folders / "t5").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"expected the name of a model .* and model\.safetensors"):
        load_text_encoder(f"transformers/{tmp_path}")


def test_a_folder_that_is_no_model(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"config\.json, tokenizer files"):
        load_text_encoder(f"transformers/{tmp_path}")
