"""Models and their readouts: heads, label words, batches, and what is refused."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from checkpoints import (
    SENTIMENT,
    STORIES,
    checkpoint,
    needs_stories,
    outputs,
    pooling,
    reviews,
    split_of,
)
from dense import assert_close
from sklearn.linear_model import LogisticRegression

from rocoft.data.splits import Split, few_shot
from rocoft.data.tasks import Example, Prompt, Task, load_task
from rocoft.models import pretrained
from rocoft.models.backbone import load_backbone
from rocoft.models.pretrained import BackboneError
from rocoft.models.readouts import MeanPooled


@pytest.fixture
def body(tmp_path):
    return checkpoint(tmp_path / "body")[0]


@pytest.fixture
def masked(tmp_path):
    return checkpoint(tmp_path / "masked", "BertForMaskedLM")


# Heads.


@pytest.mark.parametrize("labels", [("bad", "good"), ("bad", "good", "ok")])
def test_probe_is_a_logistic_regression_on_the_features(body, labels):
    split = reviews(12, labels=labels)
    backbone = load_backbone(body, split, dtype=torch.float64)
    numbers = np.array([e.label for e in split.train])
    found = outputs(backbone, split.train)
    assert backbone.readout == "head"
    assert backbone.new_head
    features = []
    for example in split.train:
        (batch,), _ = backbone.encode([example], 1)
        with torch.no_grad():
            features.append(backbone.module.bert(**batch).pooler_output[0].numpy())
    probe = LogisticRegression(max_iter=5000).fit(np.array(features), numbers)
    odds = torch.as_tensor(probe.predict_proba(np.array(features)))
    assert_close(found.softmax(1), odds, 1e-3)
    assert (found.argmax(1).numpy() == numbers).mean() > 0.6
    assert any("probe" in note for note in backbone.notes)


def test_probe_fits_separable_examples():
    """Eight examples in 384 dimensions can be told apart."""
    split = few_shot(load_task("reviews"), 4, 1, 0)
    found = outputs(load_backbone(None, split), split.train)
    assert found.argmax(1).tolist() == [e.label for e in split.train]


def test_random_head_is_seeded(body):
    split = reviews()

    def head(seed):
        state = torch.get_rng_state()
        backbone = load_backbone(body, split, head="random", seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return backbone.module.classifier.weight.detach()

    first = head(0)
    torch.rand(3)
    assert torch.equal(head(0), first)
    assert not torch.equal(head(1), first)


def test_a_probe_leaves_the_random_numbers_alone(body):
    state = torch.get_rng_state()
    load_backbone(body, reviews())
    assert torch.equal(torch.get_rng_state(), state)


def test_own_head_is_kept(tmp_path):
    folder, model = checkpoint(tmp_path, "BertForSequenceClassification")
    backbone = load_backbone(folder, reviews(), max_length=20)
    assert not backbone.new_head
    assert backbone.notes == []
    saved = model.state_dict()
    for name, value in backbone.module.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_own_head_of_other_labels_is_replaced(tmp_path):
    folder, model = checkpoint(tmp_path, "BertForSequenceClassification", num_labels=3)
    backbone = load_backbone(folder, reviews())
    assert backbone.new_head
    assert outputs(backbone, reviews().train).shape[1] == 2
    query = "bert.encoder.layer.1.attention.self.query.weight"
    assert torch.equal(backbone.module.get_parameter(query), model.get_parameter(query))
    assert any("classifier.weight" in note for note in backbone.notes)


def test_model_is_ready(body):
    backbone = load_backbone(body, reviews(), dtype=torch.float64)
    assert not backbone.module.training
    assert {p.dtype for p in backbone.module.parameters()} == {torch.float64}


def test_sentence_encoder_is_read_out_by_the_mean(body):
    pooling(body, pooling_mode_mean_tokens=True)
    backbone = load_backbone(body, reviews(), dtype=torch.float64)
    assert isinstance(backbone.module, MeanPooled)
    assert not any("pooler" in n for n, _ in backbone.module.named_parameters())
    encoder = tf.AutoModel.from_pretrained(body, dtype=torch.float64).eval()
    head = backbone.module.classifier
    examples = reviews().train
    found = outputs(backbone, examples)
    for row, example in zip(found, examples, strict=True):
        tokens = backbone.tokenizer(example.a, return_tensors="pt")
        with torch.no_grad():
            mean = encoder(**tokens).last_hidden_state[0].mean(0)
            assert_close(row, head(mean), 1e-9)
    right = [a == e.label for a, e in zip(found.argmax(1), examples, strict=True)]
    assert sum(right) > 0.75 * len(right)


def test_other_sentence_encoders_are_not(body):
    pooling(body, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert not isinstance(load_backbone(body, reviews()).module, MeanPooled)


# Label words.


def test_masked_readout_is_the_logits_of_the_label_words(masked):
    folder, model = masked
    split = reviews(prompt=SENTIMENT)
    backbone = load_backbone(folder, split)
    assert backbone.readout == "masked"
    assert not backbone.new_head
    found = outputs(backbone, split.train)
    words = backbone.tokenizer.convert_tokens_to_ids(["terrible", "great"])
    for row, example in zip(found, split.train, strict=True):
        text = f"{example.a} it was [MASK]."
        tokens = backbone.tokenizer(text, return_tensors="pt")
        at = tokens["input_ids"][0].tolist().index(backbone.tokenizer.mask_token_id)
        with torch.no_grad():
            expected = model(**tokens).logits[0, at, words]
        assert_close(row, expected, 1e-5)


def test_masked_readout_of_a_pair(masked):
    folder, model = masked
    examples = (Example("the film was fun ?", "a fine play .", 0),)
    prompt = Prompt("{a}? {mask}, {b}", ("great", "terrible"), "")
    task = Task("pair", ("x", "y"), examples, examples, prompt, "here")
    backbone = load_backbone(folder, Split(task, examples, examples, 0))
    text = "the film was fun? [MASK], a fine play ."
    tokens = backbone.tokenizer(text, return_tensors="pt")
    words = backbone.tokenizer.convert_tokens_to_ids(["great", "terrible"])
    at = tokens["input_ids"][0].tolist().index(backbone.tokenizer.mask_token_id)
    with torch.no_grad():
        assert_close(
            outputs(backbone, examples)[0], model(**tokens).logits[0, at, words], 1e-5
        )


@needs_stories
def test_causal_readout_is_the_logits_after_the_last_token():
    prompt = Prompt("{a} It was {mask}.", ("happy", "little"), "{a} It was")
    texts = (
        "Once upon a time there was a girl named Lily.",
        "She ran.",
        "The big dog and the small cat played in the park all day.",
        "One day a bird came to the tree.",
    )
    split = split_of(*texts, prompt=prompt)
    backbone = load_backbone(str(STORIES), split)
    assert backbone.readout == "causal"
    batches, _ = backbone.encode(split.train, 4)
    assert not batches[0]["attention_mask"].all()  # so that there is padding
    model = tf.AutoModelForCausalLM.from_pretrained(STORIES).eval()
    vocabulary = backbone.tokenizer.get_vocab()
    words = [vocabulary["▁happy"], vocabulary["▁little"]]
    found = outputs(backbone, split.train, 4)
    for row, text in zip(found, texts, strict=True):
        tokens = backbone.tokenizer(f"{text} It was", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert_close(row, model(tokens).logits[0, -1, words], 1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("greatish", "terrible"), "'greatish' is not one token .*'great', '##ish'"),
        (("unheard", "great"), "'unheard' is not one token .*UNK"),
        (("great", "great"), "are not distinct tokens"),
    ],
)
def test_refused_label_words(masked, words, message):
    split = reviews(prompt=replace(SENTIMENT, words=words))
    with pytest.raises(BackboneError, match=message):
        load_backbone(masked[0], split)


def test_refused_second_mask(masked):
    split = split_of("the film was [MASK]", "a fine film", prompt=SENTIMENT)
    backbone = load_backbone(masked[0], split)
    with pytest.raises(BackboneError, match="exactly one mask"):
        backbone.encode(split.train, 4)


def test_refused_readouts(masked, body):
    with pytest.raises(BackboneError, match="readout='masked' needs a prompt"):
        load_backbone(masked[0], reviews(), readout="masked")
    with pytest.raises(BackboneError, match=r"lacks cls\.predictions.*--readout head"):
        load_backbone(body, reviews(prompt=SENTIMENT), readout="masked")


def test_a_language_model_without_prompt_gets_a_head(masked):
    backbone = load_backbone(masked[0], reviews())
    assert (backbone.readout, backbone.new_head) == ("head", True)


# Batches.


@pytest.mark.parametrize("prompt", [None, SENTIMENT])
def test_batches_are_sorted_by_length(masked, prompt):
    split = reviews(11, prompt=prompt)
    backbone = load_backbone(masked[0], split)
    batches, order = backbone.encode(split.train, 4)
    assert sorted(order) == list(range(11))
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 3]
    lengths = [int(n) for b in batches for n in b["attention_mask"].sum(1)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2
    # No batch is wider than its longest example.
    assert all(b["attention_mask"].any(0).all() for b in batches)
    rows = [row for b in batches for row in zip(*b.values(), strict=True)]
    for row, i in zip(rows, order, strict=True):
        (alone,), _ = backbone.encode([split.train[i]], 1)
        for found, expected in zip(row, alone.values(), strict=True):
            if expected.ndim == 2:
                found = found[: expected.shape[1]]
            assert torch.equal(found, expected[0])


@pytest.mark.parametrize("prompt", [None, SENTIMENT])
def test_long_examples_are_cut_and_counted(masked, prompt):
    long = "the film was " + "very " * 12 + "fine"
    split = split_of(long, "a fine film", "a dull film", long, prompt=prompt)
    backbone = load_backbone(masked[0], split, max_length=10)
    batches, _ = backbone.encode(split.train, 2)
    assert max(b["input_ids"].shape[1] for b in batches) == 10
    assert "2 of 4 examples were cut to 10 tokens" in backbone.notes
    if prompt is not None:
        for batch in batches:
            at = batch["position"][:, None]
            tokens = batch["input_ids"].gather(1, at)
            assert (tokens == backbone.tokenizer.mask_token_id).all()
        # The end of the prompt is whole.
        end = backbone.tokenizer("very fine it was [MASK].")["input_ids"][1:]
        assert batches[-1]["input_ids"][0, -len(end) :].tolist() == end


def test_short_examples_are_not_cut(body):
    assert not any("cut" in note for note in load_backbone(body, reviews()).notes)


def test_unknown_words_are_cut_too(masked):
    split = split_of("zzz " * 20, "a fine film", prompt=SENTIMENT)
    backbone = load_backbone(masked[0], split, max_length=10)
    batches, _ = backbone.encode(split.train, 2)
    assert batches[0]["input_ids"].shape[1] == 10


def test_limit_of_the_model(body):
    long = "the film was " + "very " * 40 + "fine"
    split = split_of(long, "a fine film", "a dull film")
    backbone = load_backbone(body, split, max_length=128)
    assert backbone.max_length == 24
    assert "max_length=128 is over the model's limit 24" in backbone.notes
    assert outputs(backbone, split.train).isfinite().all()


# What cannot be loaded.


def test_unknown_model_without_network_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(pretrained, "_hub_is_known", lambda: False)
    start = time.perf_counter()
    with pytest.raises(
        BackboneError, match=r"'no/such-model' could not .*embedded MiniLM"
    ):
        load_backbone("no/such-model", reviews())
    assert time.perf_counter() - start < 5


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(BackboneError, match="could not be loaded: .*embedded MiniLM"):
        load_backbone(str(tmp_path), reviews())


@pytest.mark.parametrize(
    "kind", ["Bert", "DebertaV2", "GPT2", "Roberta", "T5", "XLMRoberta", "Qwen2"]
)
def test_folder_without_a_tokenizer(tmp_path, kind):
    """transformers makes tokenizers of special tokens only, or of a space besides."""
    getattr(tf, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="tokenizer of model .* knows no word"):
        pretrained.load_pretrained(tf.AutoTokenizer, str(tmp_path), str(tmp_path))


def test_tokenizer_is_taken_away(tmp_path):
    folder, _ = checkpoint(tmp_path, "BertForSequenceClassification")
    split = split_of("the film was fine", "the play was dull")
    load_backbone(folder, split)
    for file in [*tmp_path.glob("token*"), *tmp_path.glob("vocab*")]:
        file.unlink()
    with pytest.raises(BackboneError, match=r"5 special tokens.*tokenizer.json"):
        load_backbone(folder, split)


def test_examples_of_unknown_tokens_only_are_refused(body):
    foreign = [f"\u043e\u0447\u0435\u043d\u044c {i}" for i in range(4)]
    with pytest.raises(BackboneError, match=r"no token of the 4 examples: .*UNK"):
        load_backbone(body, split_of(*foreign))
    load_backbone(body, split_of(*foreign, "the film was fun"))


@pytest.mark.parametrize("kind", ["ByT5", "Canine"])
def test_tokenizers_of_characters_need_no_files(tmp_path, kind):
    tokenizer = getattr(tf, f"{kind}Tokenizer")()
    tokenizer.save_pretrained(tmp_path)
    found = pretrained.load_pretrained(
        getattr(tf, f"{kind}Tokenizer"), str(tmp_path), kind
    )
    assert found("fun")["input_ids"] == tokenizer("fun")["input_ids"]


def test_checkpoint_that_lacks_weights_of_the_body(body):
    file = Path(body) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(BackboneError, match=r"lacks \d+ weights of the body"):
        load_backbone(body, reviews())


def test_sentence_encoder_that_lacks_weights_of_the_body(body):
    pooling(body, pooling_mode_mean_tokens=True)
    file = Path(body) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(BackboneError, match="lacks"):
        load_backbone(body, reviews())
