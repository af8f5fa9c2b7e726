"""Prompts and completions: what is learnt of them, and models that learn them."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as tf
from cases import T5, sizes
from dense import assert_close

from rocoft import train
from rocoft.language import (
    IGNORED,
    Completion,
    Completions,
    encode_completion,
    generated,
    has_prompts,
    log_likelihoods,
    read_completions,
    split_completions,
)
from rocoft.sft import LanguageModel, fine_tune_language, load_language_model
from rocoft.tasks import TaskError

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is absent")

PLACES = ("park", "house", "forest", "garden")
NAMES = ("Lily", "Tom", "Sue", "Ben", "Mia", "Max", "Sam", "Amy")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def stories(tmp_path):
    """Prompts whose completions the names decide."""
    rows = [
        {
            "prompt": f"{name} went to the {place}. {name} saw a",
            "completion": " big red dog." if i % 2 else " little blue bird.",
        }
        for i, name in enumerate(NAMES)
        for place in PLACES
    ]
    return write(tmp_path / "stories.jsonl", rows)


@pytest.fixture
def choices(tmp_path):
    rows = [
        {
            "prompt": f"{name} went to the {place}. The dog was",
            "choices": [" zqxj.", " happy and very big."],
            "answer": i % 2,
        }
        for i, name in enumerate(NAMES)
        for place in PLACES
    ]
    return write(tmp_path / "choices.jsonl", rows)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of words that ends texts as T5's does."""
    kinds = "<pad> </s> <unk> a b c d e f g h one two three four"
    vocabulary = {word: i for i, word in enumerate(kinds.split())}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=built, **special)


@pytest.fixture
def t5(words):
    config = tf.T5Config(**sizes(T5), dropout_rate=0.0)
    model = tf.T5ForConditionalGeneration(config).eval()
    return LanguageModel("tiny T5", model, words, 16)


# What is learnt.


def test_only_the_completion_is_learnt(words):
    encoded = encode_completion(
        words, "a b c", " one two", max_length=16, encoder_decoder=False
    )
    tokens = words.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["a", "b", "c", "one", "two", "</s>"]
    assert encoded["labels"] == [IGNORED] * 3 + encoded["input_ids"][3:]
    assert encoded["attention_mask"] == [1] * 6


def test_a_long_prompt_loses_its_front(words):
    encoded = encode_completion(
        words, "a b c d e f", " one two", max_length=5, encoder_decoder=False
    )
    tokens = words.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["e", "f", "one", "two", "</s>"]
    assert encoded["labels"][:2] == [IGNORED] * 2


def test_an_encoder_takes_the_prompt_alone(words):
    encoded = encode_completion(
        words, "a b c", "one two", max_length=16, encoder_decoder=True
    )
    tokens = [words.convert_ids_to_tokens(encoded[k]) for k in ("input_ids", "labels")]
    assert tokens == [["a", "b", "c", "</s>"], ["one", "two", "</s>"]]


@needs_stories
def test_tokens_that_cross_the_border_are_learnt():
    tokenizer = tf.AutoTokenizer.from_pretrained(STORIES)
    prompt, completion = "Once upon a ti", "me there was"
    encoded = encode_completion(
        tokenizer, prompt, completion, max_length=64, encoder_decoder=False
    )
    whole = tokenizer(prompt + completion)["input_ids"]
    assert encoded["input_ids"] == [*whole, tokenizer.eos_token_id]
    learnt = [t for t in encoded["labels"] if t != IGNORED]
    text = tokenizer.decode(learnt, skip_special_tokens=True)
    assert text.strip() == "time there was"


def test_an_empty_completion_is_refused(words):
    with pytest.raises(TaskError, match="' ' of prompt 'a b' has no token of its own"):
        encode_completion(words, "a b", " ", max_length=9, encoder_decoder=False)


# How likely it is.


@pytest.mark.parametrize("shifted", [True, False])
def test_log_likelihoods_are_sums_over_the_labels(shifted):
    logits = torch.randn(3, 5, 7)
    labels = torch.randint(7, (3, 5))
    labels[0, :2] = labels[1, 4:] = labels[2, 1] = IGNORED
    for row, (total, count) in enumerate(
        log_likelihoods(logits, labels, shifted=shifted).tolist()
    ):
        expected, seen = 0.0, 0
        for t in range(5):
            label = int(labels[row, t])
            if label != IGNORED and (t > 0 or not shifted):
                odds = logits[row, t - shifted].softmax(0)
                expected, seen = expected + float(odds[label].log()), seen + 1
        assert count == seen
        assert abs(total - expected) < 1e-5


@needs_stories
def test_the_likeliest_choice_is_that_of_the_mean_log_likelihood(choices):
    start = load_language_model(str(STORIES))
    data = split_completions(choices, seed=0)
    tuned = fine_tune_language(
        start, data, "rows:1", lrs=[0.0], arguments={"num_train_epochs": 1}
    )
    model, tokenizer = start.model, start.tokenizer
    right = 0
    for row, example in zip(tuned.logits, data.test, strict=True):
        means = []
        for choice in example.choices:
            given = tokenizer(example.prompt)["input_ids"]
            tokens = tokenizer(example.prompt + choice, return_tensors="pt")[
                "input_ids"
            ]
            tokens = torch.cat([tokens, torch.tensor([[tokenizer.eos_token_id]])], 1)
            with torch.no_grad():
                odds = model(tokens).logits[0, :-1].log_softmax(-1)
            each = odds[range(len(tokens[0]) - 1), tokens[0, 1:]]
            means.append(each[len(given) - 1 :].mean())
        assert_close(row, torch.stack(means), 1e-5)
        right += int(torch.stack(means).argmax()) == example.answer
    assert tuned.record["test"]["accuracy"] == right / len(data.test)
    assert tuned.labels.tolist() == [example.answer for example in data.test]


# Models that learn.


@needs_stories
@pytest.mark.parametrize("method", ["rows:3", "lora:4", "full"])
def test_a_causal_model_learns_completions_and_writes_them(stories, method):
    start = load_language_model(str(STORIES))
    before = {n: p.clone() for n, p in start.model.named_parameters()}
    data = split_completions(stories, seed=0)
    arguments = {"num_train_epochs": 10, "per_device_train_batch_size": 4}
    # A learning rate of zero trains nothing: what dev is before.
    tuned = fine_tune_language(
        start,
        data,
        method,
        lrs=[0.0, 1e-3 if method == "full" else 1e-2],
        arguments=arguments,
    )
    record = tuned.record
    untrained, trained = (run["dev"] for run in record["learning_rates"])
    assert record["learning_rate"] > 0
    assert trained["log_likelihood"] > untrained["log_likelihood"] / 3, record
    assert trained["loss"] < untrained["loss"] / 3
    assert record["test"]["token_f1"] > 0.5
    text = generated(tuned.model, start.tokenizer, ["Lily saw a"], max_new_tokens=12)
    assert text[0].strip().startswith(("big red dog.", "little blue bird."))
    for name, parameter in start.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert record["parameters"]["head"] == 0


@needs_stories
def test_multiple_choice_is_learnt(choices):
    start = load_language_model(str(STORIES))
    data = split_completions(choices, seed=0)
    few = Completions(
        "sure", *([_always(e, 0) for e in part] for part in _parts(data)), 0, "here"
    )
    arguments = {"num_train_epochs": 6, "per_device_train_batch_size": 4}
    tuned = fine_tune_language(
        start, few, "columns:2", lrs=[0.0, 1e-2], arguments=arguments
    )
    untrained, trained = (run["dev"] for run in tuned.record["learning_rates"])
    assert untrained["accuracy"] == 0.0, "the pretrained model prefers words"
    assert trained["accuracy"] == tuned.record["test"]["accuracy"] == 1.0


def _parts(data):
    return data.train, data.dev, data.test


def _always(example, answer):
    return Completion(example.prompt, example.choices, answer)


@pytest.mark.parametrize("method", ["rows:2", "full"])
def test_an_encoder_decoder_learns_to_translate(t5, method):
    numbers = dict(zip("abcd", ("one", "two", "three", "four"), strict=True))
    pairs = [
        Completion(f"{x} {y}", (f"{numbers[x]} {numbers[y]}",))
        for x in "abcd"
        for y in "abcd"
    ] * 2
    data = Completions(
        "translate", tuple(pairs), tuple(pairs[:4]), tuple(pairs[:8]), 0, ""
    )
    arguments = {"num_train_epochs": 40, "per_device_train_batch_size": 8}
    tuned = fine_tune_language(
        t5,
        data,
        method,
        lrs=[0.0, 1e-2 if method == "full" else 1e-1],
        arguments=arguments,
    )
    untrained, trained = (run["dev"] for run in tuned.record["learning_rates"])
    assert tuned.record["readout"] == "seq2seq"
    assert trained["log_likelihood"] > untrained["log_likelihood"] / 1.5
    if method == "full":
        assert tuned.record["test"]["exact_match"] > 0.7


@needs_stories
def test_writing_in_batches_is_writing_one_by_one():
    start = load_language_model(str(STORIES))
    prompts = ["Once upon a time", "Lily", "The big dog ran to the park and"]
    together = generated(start.model, start.tokenizer, prompts, max_new_tokens=12)
    for prompt, text in zip(prompts, together, strict=True):
        tokens = start.tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = start.model.generate(tokens, max_new_tokens=12, do_sample=False)
        written = alone[0, tokens.shape[1] :]
        expected = start.tokenizer.decode(written, skip_special_tokens=True)
        assert text == expected
    assert start.tokenizer.padding_side == "right"


@needs_stories
def test_the_command_trains_on_prompts(stories, tmp_path, capsys):
    code = train.main(
        f"--model {STORIES} --data {stories} --rows 2 --lr 1e-2 --num_train_epochs 2 "
        f"--output_dir {tmp_path / 'runs'} --name a".split()
    )
    assert code == 0
    folder = tmp_path / "runs" / "a"
    record = json.loads((folder / "results.json").read_text())
    assert record["readout"] == "causal"
    assert set(record["test"]) == {"log_likelihood", "exact_match", "token_f1"}
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert "token_f1" in capsys.readouterr().out


# Files.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is not JSON"),
        ('{"text": "a"}', "line 2 .* has no text as 'prompt'"),
        ('{"prompt": "a"}', "neither a text as 'completion' nor two or more"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "two or more"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer=2, .* 0 to 1"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer=True"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 1}', "mixes completions"),
    ],
)
def test_refused_lines(tmp_path, line, message):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(TaskError, match=message):
        read_completions(file)


def test_parts_are_disjoint_and_the_test_is_the_same_always(stories):
    first, second = (split_completions(stories, seed=seed) for seed in (0, 1))
    for data in (first, second):
        examples = [e for part in _parts(data) for e in part]
        assert len(examples) == len(set(examples)) == len(NAMES) * len(PLACES)
    assert first.test == second.test
    assert first.dev != second.dev


def test_a_file_of_prompts_is_told_from_one_of_labels(stories, tmp_path):
    other = tmp_path / "labels.jsonl"
    other.write_text('{"text": "a prompt", "label": 1}\n')
    assert has_prompts(stories)
    assert not has_prompts(other)
    assert not has_prompts(tmp_path / "absent.jsonl")
