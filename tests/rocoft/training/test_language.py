"""Prompts and completions: what is learnt of them, and models that learn them."""

import copy
import json
import re

import pytest
import tokenizers
import torch
import transformers as tf
from cases import BART, GPT2, T5, sizes
from checkpoints import STORIES, needs_stories
from dense import assert_close

from rocoft import train
from rocoft.data.prompts import (
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
from rocoft.data.tasks import TaskError
from rocoft.training.language import (
    LanguageModel,
    fine_tune_language,
    load_language_model,
)

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
@pytest.mark.parametrize(
    "method",
    [
        "rows:3",
        pytest.param("lora:4", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.slow),
    ],
)
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
    text = generated(
        tuned.model, start.tokenizer, ["Lily saw a"], max_new_tokens=12, max_length=64
    )
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


@pytest.mark.parametrize(
    "method", ["full", pytest.param("rows:2", marks=pytest.mark.slow)]
)
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
    together = generated(
        start.model, start.tokenizer, prompts, max_new_tokens=12, max_length=64
    )
    for prompt, text in zip(prompts, together, strict=True):
        tokens = start.tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = start.model.generate(tokens, max_new_tokens=12, do_sample=False)
        written = alone[0, tokens.shape[1] :]
        expected = start.tokenizer.decode(written, skip_special_tokens=True)
        assert text == expected
    assert start.tokenizer.padding_side == "right"


@pytest.fixture
def gpt2(words):
    config = tf.GPT2Config(**{**sizes(GPT2), "n_positions": 12, "eos_token_id": 1})
    model = tf.GPT2LMHeadModel(config).eval()
    return LanguageModel("tiny GPT-2", model, words, 12)


def lengths_of(*numbers):
    """Return completions whose prompts have so many words."""
    return [Completion("a b c d e f g h "[: 2 * n], (" one two",)) for n in numbers]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_long_prompts_are_cut_where_texts_are_written(request, kind):
    start = request.getfixturevalue(kind)
    prompt = "a b c d e f g h " * 4
    options = {"max_new_tokens": 4, "max_length": 12}
    (found,) = generated(start.model, start.tokenizer, [prompt], **options)
    # A causal model answers at the end of the prompt, an encoder reads its front.
    cut = " ".join(prompt.split()[-8:] if kind == "gpt2" else prompt.split()[:11])
    assert [found] == generated(start.model, start.tokenizer, [cut], **options)


def test_a_model_is_tested_on_prompts_beyond_its_positions(gpt2):
    examples = lengths_of(3, 8) + [Completion("a b c d " * 6, (" one two",))]
    assert gpt2.truncated(examples) == 1
    data = Completions("long", *[tuple(examples)] * 3, 0, "")
    arguments = {"num_train_epochs": 1}
    tuned = fine_tune_language(gpt2, data, "rows:1", lrs=[1e-3], arguments=arguments)
    assert "exact_match" in tuned.record["test"]


def test_the_first_token_is_not_learnt(words):
    encoded = encode_completion(
        words, "a", " one two three", max_length=3, encoder_decoder=False
    )
    assert words.convert_ids_to_tokens(encoded["input_ids"]) == ["two", "three", "</s>"]
    assert encoded["labels"] == [IGNORED, *encoded["input_ids"][1:]]


@pytest.mark.parametrize(("kind", "smoothing"), [("gpt2", 0.2), ("t5", 0.0)])
def test_accumulated_steps_are_one_large_step(request, kind, smoothing):
    """One step of plain gradient descent on the mean over all labels."""
    start = request.getfixturevalue(kind)
    for module in start.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ends = (" one", " two three four one", " four one", " three two one")
    pairs = [Completion("a b c"[:n], (end,)) for n in (1, 3) for end in ends]
    data = Completions("few", *[tuple(pairs)] * 3, 0, "")
    arguments = {
        "max_steps": 1,
        "optim": "sgd",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "label_smoothing_factor": smoothing,
    }
    model = copy.deepcopy(start.model)
    total, count = 0.0, 0
    for pair in pairs:
        encoded = encode_completion(
            start.tokenizer,
            pair.prompt,
            pair.completion,
            max_length=start.max_length,
            encoder_decoder=start.encoder_decoder,
        )
        row = {key: torch.tensor([value]) for key, value in encoded.items()}
        odds = model(**row).logits[0].log_softmax(-1)
        labels = row["labels"][0]
        odds, labels = (odds, labels) if kind == "t5" else (odds[:-1], labels[1:])
        for each, label in zip(odds, labels, strict=True):
            if label != IGNORED:
                total = total - (1 - smoothing) * each[label] - smoothing * each.mean()
                count += 1
    (total / count).backward()
    for size, passes in ((8, 1), (2, 4), (3, 3)):
        arguments |= {"per_device_train_batch_size": size}
        arguments |= {"gradient_accumulation_steps": passes}
        tuned = fine_tune_language(start, data, "full", lrs=[0.5], arguments=arguments)
        for (name, found), by_hand in zip(
            tuned.model.named_parameters(), model.parameters(), strict=True
        ):
            expected = (by_hand - 0.5 * by_hand.grad).detach()
            torch.testing.assert_close(
                found.detach(),
                expected,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m, name=name, size=size: f"{name}, {size} a pass: {m}",
            )


def test_bart_learns_with_smoothed_labels(words):
    config = tf.BartConfig(**{**sizes(BART), "eos_token_id": 1})
    model = tf.BartForConditionalGeneration(config).eval()
    start = LanguageModel("tiny BART", model, words, 16)
    data = Completions("few", *[tuple(lengths_of(1, 2, 3, 4))] * 3, 0, "")
    arguments = {"num_train_epochs": 20, "label_smoothing_factor": 0.1}
    tuned = fine_tune_language(
        start, data, "rows:2", lrs=[0.0, 5e-2], arguments=arguments
    )
    untrained, trained = (run["dev"] for run in tuned.record["learning_rates"])
    assert trained["loss"] < untrained["loss"]


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
    printed = capsys.readouterr().out
    assert "token_f1" in printed
    assert "were cut" not in printed


@needs_stories
def test_the_command_says_how_many_prompts_were_cut(stories, tmp_path, capsys):
    code = train.main(
        f"--model {STORIES} --data {stories} --rows 2 --lr 1e-2 --max_steps 1 "
        f"--max_length 12 --output_dir {tmp_path / 'runs'} --name a".split()
    )
    assert code == 0
    note = re.search(
        r"note: (\d+) of 32 examples were cut to 12", capsys.readouterr().out
    )
    tokenizer = tf.AutoTokenizer.from_pretrained(STORIES)
    texts = [e.prompt + e.completion for e in read_completions(stories)]
    # The end of the text is a token, too.
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
    assert int(note[1]) == sum(length > 12 for length in lengths) > 0


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
