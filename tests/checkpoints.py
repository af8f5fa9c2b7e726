"""Tiny models on disk with their tokenizers, and reviews that they can tell apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from rocoft.data.splits import Split
from rocoft.data.tasks import Example, Task
from rocoft.data.templates import Prompt

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is absent")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "a it was terrible great film play story dull bore weak fine fun smart the and "
    "very more plot cast ok ##ish . ? ,"
)
BAD, GOOD = ("dull", "bore", "weak"), ("fine", "fun", "smart")
SENTIMENT = Prompt("{a} It was {mask}.", ("terrible", "great"), "{a} It was")
QUANTISED = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}


def split_of(*texts, labels=("bad", "good"), prompt=None, test=()):
    """Return a split of texts, whose labels are their places modulo the labels."""
    examples = tuple(Example(t, None, i % len(labels)) for i, t in enumerate(texts))
    tests = tuple(Example(t, None, i % len(labels)) for i, t in enumerate(test))
    task = Task("tiny", labels, examples, tests, prompt, "here")
    return Split(task, examples, tests, 0)


def reviews(count=8, prompt=None, test=4, labels=("bad", "good")):
    """Return separable reviews of many lengths."""
    texts = [
        f"the {('film', 'play', 'story')[i % 3]} was "
        + "very " * ((5 * i) % 4)
        + (BAD, GOOD, ("ok", "cast", "plot"))[i % len(labels)][i % 3]
        for i in range(count + test)
    ]
    return split_of(*texts[:count], prompt=prompt, test=texts[count:], labels=labels)


def checkpoint(folder, kind="BertModel", **config):
    """Save a tiny BERT and its tokenizer; return the folder and the model."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 24,
        "initializer_range": 0.4,
    }
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS.split()))}
    options = tf.BertConfig(vocab_size=len(vocabulary), **sizes, **config)
    model = getattr(tf, kind)(options).eval()
    model.save_pretrained(folder)
    tf.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return str(folder), model


def causal_checkpoint(folder, kind="Llama", start=True, end=False, **config):
    """Save a tiny causal model with its tokenizer; return the folder and the model.

    The tokenizer puts "<s>" before a text if ``start``, and "</s>" after it if ``end``.
    """
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "initializer_range": 0.4,
    }
    words = ("<s>", "</s>", "<unk>", *WORDS.split(), "##ly", "##er")
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.normalizer = Lowercase()
    tokenizer.post_processor = TemplateProcessing(
        single=" ".join(["<s>"] * start + ["$A"] + ["</s>"] * end),
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    options = getattr(tf, f"{kind}Config")(
        vocab_size=len(words), **sizes, **special, **config
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(options).eval()
    model.save_pretrained(folder)
    return str(folder), model


def outputs(backbone, examples, batch_size=3):
    """Return outputs in the order of the examples."""
    batches, order = backbone.encode(examples, batch_size)
    with torch.no_grad():
        rows = [backbone.module(**batch) for batch in batches]
    rows = torch.cat([r if isinstance(r, torch.Tensor) else r.logits for r in rows])
    return rows[torch.tensor(np.argsort(order))]


def pooling(folder, **modes):
    (Path(folder) / "1_Pooling").mkdir()
    (Path(folder) / "1_Pooling" / "config.json").write_text(json.dumps(modes))
