"""Outputs of a checkpoint's own head, put in the order of the task by their names."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers as tf
from checkpoints import BAD, GOOD, checkpoint, outputs, reviews, split_of
from dense import assert_close

from ntk.kernels.empirical import empirical_ntk
from rocoft.models.backbone import load_backbone
from rocoft.models.label_names import name_outputs
from rocoft.models.pretrained import BackboneError
from rocoft.training.methods import parse_method
from rocoft.training.results import write_results
from rocoft.training.trainer import fine_tune

TASK = ("negative", "positive")


def named(folder, *names, kind="BertForSequenceClassification", **config):
    """A tiny classifier whose outputs have these names."""
    own = {"id2label": dict(enumerate(names)), "label2id": {}} | config
    return checkpoint(folder, kind, **own)


def plain(model, backbone, examples):
    """The checkpoint's own outputs, in its own order."""
    rows = []
    for example in examples:
        tokens = backbone.tokenizer(example.a, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**tokens).logits[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("names", "labels", "order"),
    [
        (("POSITIVE", "NEGATIVE"), TASK, (1, 0)),
        (("pos", "Neg"), TASK, (1, 0)),
        (("Negative", "Positive"), TASK, (0, 1)),
        (("positive", "negative"), ("pos", "neg"), (0, 1)),
        (
            ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"),
            ("entailment", "neutral", "contradiction"),
            (2, 1, 0),
        ),
        (
            ("sci_tech", "Business", "World", "SPORTS"),
            ("World", "Sports", "Business", "Sci/Tech"),
            (2, 3, 1, 0),
        ),
        (("LABEL_0", "LABEL_1"), TASK, (0, 1)),
        (("1", "0"), TASK, (0, 1)),
        (("1", "0"), ("0", "1"), (1, 0)),
        (("LABEL_1", "LABEL_0"), ("0", "1"), (1, 0)),
        (("2", "0", "1"), ("0", "1", "2"), (1, 2, 0)),
        (("1.0", "-1.0"), ("-1", "1"), (1, 0)),
        (("LABEL_0", "LABEL_1"), ("1", "2"), (0, 1)),
        (("1", "2", "3"), ("0", "1", "2"), (0, 1, 2)),
        (("-1", "1"), ("-1", "1"), (0, 1)),
    ],
)
def test_outputs_have_the_order_of_the_labels(tmp_path, names, labels, order):
    folder, model = named(tmp_path, *names)
    texts = [f"the film was {word}" for word in (*BAD, *GOOD)]
    split = split_of(*texts, labels=labels)
    backbone = load_backbone(folder, split, max_length=20)
    assert not backbone.new_head
    expected = plain(model, backbone, split.train)[:, list(order)]
    assert_close(outputs(backbone, split.train), expected, 1e-5)
    found = backbone.module.config.id2label
    assert list(found.values()) == [names[i] for i in order]
    assert backbone.module.config.label2id == {n: i for i, n in found.items()} or (
        order == tuple(range(len(order)))
    )
    notes = [note for note in backbone.notes if "the task's order" in note]
    assert len(notes) == (order != tuple(range(len(order))))
    for note in notes:
        assert f"({', '.join(names)})" in note
        assert f"({', '.join(labels)})" in note


def test_a_reversed_checkpoint_is_right_not_wrong(tmp_path):
    """Labels given by the model itself are predicted without an error."""
    folder, model = named(tmp_path, "positive", "negative")
    split = reviews(12, labels=TASK)
    own = plain(model, load_backbone(folder, split), split.train).argmax(1).tolist()
    examples = tuple(
        replace(example, label=1 - i)
        for example, i in zip(split.train, own, strict=True)
    )
    split = replace(split, train=examples)
    found = outputs(load_backbone(folder, split), examples).argmax(1).tolist()
    assert found == [example.label for example in examples]
    assert set(found) == {0, 1}


def test_kernels_are_those_of_the_checkpoint_with_permuted_outputs(tmp_path):
    folder, _ = named(tmp_path, "POS", "NEG")
    split = reviews(4, labels=TASK)
    backbone = load_backbone(folder, split, dtype=torch.float64)
    model = tf.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float64
    ).eval()
    batches, _ = backbone.encode(split.train, 2)
    expected = empirical_ntk(model, batches)
    assert_close(
        empirical_ntk(backbone.module, batches), expected[:, :, [1, 0]][..., [1, 0]]
    )


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("toxic", "fine"), "(toxic, fine) are taken, in this order, for the labels"),
        (("negative", "other"), "(negative, other) are taken, in this order"),
        # Two names of one meaning identify neither.
        (("neg", "Negative"), None),
    ],
)
def test_other_names_are_taken_in_the_order_of_the_checkpoint(tmp_path, names, note):
    folder, model = named(tmp_path, *names)
    split = reviews(6, labels=TASK)
    backbone = load_backbone(folder, split)
    assert_close(
        outputs(backbone, split.train), plain(model, backbone, split.train), 1e-5
    )
    assert any("names differ" in found for found in backbone.notes)
    assert note is None or any(note in found for found in backbone.notes)
    assert list(backbone.module.config.id2label.values()) == list(names)


def test_names_that_match_in_part_at_another_place_are_refused(tmp_path):
    folder, _ = named(tmp_path, "positive", "other")
    with pytest.raises(
        BackboneError,
        match=r"\(positive, other\) .*\(negative, positive\) match in part: 'positive'",
    ):
        load_backbone(folder, reviews(6, labels=TASK))


def test_numbers_that_match_in_part_in_no_order_are_refused(tmp_path):
    folder, _ = named(tmp_path, "2", "1")
    split = reviews(6, labels=("0", "1"))
    # Output 1 is label 1 on both sides, but what is 2?
    assert any("names differ" in note for note in load_backbone(folder, split).notes)
    folder, _ = named(tmp_path / "other", "1", "2", "0")
    with pytest.raises(BackboneError, match=r"\(1, 2, 0\) .*match in part: '0'"):
        load_backbone(folder, reviews(6, labels=("1", "0", "7")))


def test_a_last_layer_that_cannot_be_permuted_is_refused():
    config = tf.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        id2label={0: "POS", 1: "NEG"},
    )
    model = tf.BertForSequenceClassification(config)
    model.classifier = torch.nn.Sequential(torch.nn.Conv1d(8, 2, 1))
    with pytest.raises(BackboneError, match="another order .* is not linear"):
        name_outputs(model, TASK)
    model.classifier = torch.nn.Linear(8, 2)
    packed = model.classifier.weight.detach().to(torch.int8)
    model.classifier.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(BackboneError, match="is quantised.*without quantisation"):
        name_outputs(model, TASK)


@pytest.mark.parametrize("method", ["full", "rows:2"])
def test_saved_models_keep_the_order(tmp_path, method):
    folder, _ = named(tmp_path / "start", "POS", "NEG")
    split = reviews(6, labels=TASK)
    split = replace(split, dev=split.test)
    backbone = load_backbone(folder, split)
    arguments = {"num_train_epochs": 1}
    tuned = fine_tune(
        backbone, split, parse_method(method), lrs=[1e-3], arguments=arguments
    )
    record = {
        **tuned.record,
        "model": folder,
        "labels": TASK,
        "task": "tiny",
        "readout": "head",
        "examples": {"dev": 4, "test": 4},
        "seed": 0,
    }
    (tmp_path / "out").mkdir()
    write_results(tmp_path / "out", tuned, backbone.tokenizer, record)
    if method == "full":
        saved = tmp_path / "out" / "model"
        names = json.loads((saved / "config.json").read_text())["id2label"]
        assert names == {"0": "NEG", "1": "POS"}
        again = load_backbone(str(saved), split)
        assert not any("order" in note for note in again.notes)
        found = outputs(again, split.test)
    else:
        code = (tmp_path / "out" / "adapter" / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", code, re.DOTALL).group(1)
        space = {}
        exec(code.replace("this folder", str(tmp_path / "out" / "adapter")), space)
        found = plain(space["model"].eval(), backbone, split.test)
    assert_close(found, tuned.logits, 1e-5)


def test_new_heads_have_the_names_of_the_labels(tmp_path):
    folder, _ = checkpoint(tmp_path, "BertModel")
    config = load_backbone(folder, reviews(6, labels=TASK)).module.config
    assert config.id2label == {0: "negative", 1: "positive"}
