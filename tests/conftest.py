from __future__ import annotations

import os

# Small tensors: a second thread costs more than it brings, and processes that tests start share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

CAPTIONS = ["red heart, 3d style", "blue fish, flat style", "cat, 3d style", "grinning face of a dog, flat style"]


def pytest_addoption(parser):
    parser.addoption("--cases", help="folder of parity cases to run instead of tests/parity/cases")


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state, in whatever order they run."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # what `seed_everything` leaves behind
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A folder with a random T5 encoder of 16 channels, saved by transformers, and its tokenizer of a few words."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "heart", "blue", "fish", "count", "from", *map(str, range(32))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(vocab_size=42, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.5)
        T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def captions():
    return list(CAPTIONS)


@pytest.fixture(scope="session")
def text():
    from tokgen.text import TextTokenizer

    return TextTokenizer.train(CAPTIONS, 280, special_words=["3d style", "flat style"])
