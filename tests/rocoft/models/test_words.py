"""Label words: their tokens, and likelihoods of words of several tokens."""

import json
from dataclasses import replace
from pathlib import Path

import dense
import pytest
import torch
import transformers as tf
from checkpoints import SENTIMENT, causal_checkpoint, checkpoint, outputs, reviews
from dense import assert_close

from ntk.gradients.coverage import Service, services
from ntk.gradients.function import NetworkFunction
from ntk.kernels.empirical import compute, empirical_ntk
from ntk.kernels.options import KernelOptions
from ntk.spaces.kinds import Columns, Embeddings, Full, LoRA, Norm, Rows
from rocoft.models.backbone import load_backbone
from rocoft.models.pretrained import BackboneError
from rocoft.models.readouts import AtPositions, LabelWords, PromptedSequences
from rocoft.training.methods import parse_method
from rocoft.training.results import write_results
from rocoft.training.trainer import FineTuned, fine_tune

SINGLE = replace(SENTIMENT, words=("dull", "great"))
SEVERAL = replace(SENTIMENT, words=("dull", "greatly fine", "film"))
LABELS = ("bad", "good", "other")
FAMILIES = {
    "Llama": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "GPT2": {},  # Conv1D layers flatten examples, and positions are learned.
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "Gemma2": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "final_logit_softcapping": 2.0,
        "attn_implementation": "eager",
    },
}


def several(folder, kind="Llama", **options):
    """A tiny model with words of one, three and one tokens, and its split."""
    path, model = causal_checkpoint(folder, kind, **FAMILIES.get(kind, {}))
    split = reviews(5, prompt=SEVERAL, labels=LABELS)
    return load_backbone(path, split, dtype=torch.float64, **options), split, model


def likelihoods(backbone, model, text):
    """Add log p of every token of every word after the prompt, one by one."""
    tokenizer = backbone.tokenizer
    prompt = tokenizer(f"{text} it was")["input_ids"]
    sums = []
    for word in backbone.prompt.words:
        total, read = 0.0, list(prompt)
        for token in tokenizer(word, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                logits = model(torch.tensor([read])).logits[0, -1]
            total += float(logits.double().log_softmax(0)[token])
            read.append(token)
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("kind", FAMILIES)
def test_outputs_are_the_likelihoods_of_the_words(tmp_path, kind):
    backbone, split, model = several(tmp_path, kind)
    assert isinstance(backbone.module, PromptedSequences)
    found = outputs(backbone, split.train, 5)
    for row, example in zip(found, split.train, strict=True):
        assert_close(row, likelihoods(backbone, model, example.a), 1e-5)
    assert any("words of up to 3 tokens" in note for note in backbone.notes)


@pytest.mark.parametrize("kind", FAMILIES)
def test_kernels_of_likelihoods_are_exact(tmp_path, kind):
    backbone, split, _ = several(tmp_path, kind)
    batches, _ = backbone.encode(split.train, 3)
    assert len({b["input_ids"].shape[1] for b in batches}) == 2
    spaces = {
        "full": Full(),
        "rows": Rows(2),
        "columns": Columns(2),
        "lora": LoRA(2),
        "norm": Norm(),
        "embeddings": Embeddings(),
    }
    found = compute(backbone.module, batches, spaces=spaces)
    judge = compute(
        backbone.module,
        batches,
        spaces=spaces,
        options=KernelOptions(implementation="jacobian"),
    )
    for name in spaces:
        assert_close(found.kernels[name], judge.kernels[name], of=name)
    gradients = dense.gradients(backbone.module, batches)
    assert_close(found.kernels["full"], dense.kernel(list(gradients.values())))


@pytest.mark.parametrize("kind", FAMILIES)
def test_likelihoods_need_no_passes_by_example(tmp_path, kind):
    backbone, split, _ = several(tmp_path, kind)
    (batch, *_), _ = backbone.encode(split.train, 3)
    function = NetworkFunction(backbone.module)
    verdicts = services(function, batch, list(function.parameters))
    assert {verdict.service for verdict in verdicts.values()} == {Service.BATCH}


def test_words_of_one_token_differ_only_by_the_normaliser(tmp_path):
    path, _ = causal_checkpoint(tmp_path)
    split = reviews(5, prompt=SINGLE)
    backbone = load_backbone(path, split, dtype=torch.float64)
    assert isinstance(backbone.module.model.get_output_embeddings(), LabelWords)
    model = tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    model.set_output_embeddings(AtPositions(model.get_output_embeddings()))
    tokens = backbone.tokenizer.convert_tokens_to_ids(["dull", "great"])
    module = PromptedSequences(model, [[token] for token in tokens])
    likely = replace(backbone, module=module, sequences=True)
    shared = outputs(backbone, split.train) - outputs(likely, split.train)
    assert_close(shared[:, 0], shared[:, 1])
    contrast = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    left, right = (
        empirical_ntk(
            each.module, each.encode(split.train, 3)[0], outputs=lambda y: y @ contrast
        )
        for each in (backbone, likely)
    )
    assert_close(left, right)


def test_the_words_fit_behind_the_longest_prompt(tmp_path):
    backbone, *_ = several(tmp_path, "GPT2", max_length=64)
    assert backbone.max_length == 30  # of 32, as the word has three tokens
    (long,) = reviews(1, test=0, labels=("x",)).train
    long = replace(long, a="very " * 60)
    assert outputs(backbone, [long]).isfinite().all()


@pytest.mark.parametrize("method", ["rows:2", "full", "rows:2/strategy=gradient"])
def test_training_on_likelihoods(tmp_path, method):
    path, model = causal_checkpoint(tmp_path / "start", tie_word_embeddings=True)
    split = reviews(6, prompt=SEVERAL, labels=LABELS)
    split = replace(split, dev=split.test)
    backbone = load_backbone(path, split)
    before = outputs(backbone, split.test)
    tuned = fine_tune(
        backbone,
        split,
        parse_method(method),
        lrs=[1e-2],
        arguments={"num_train_epochs": 2},
        keep="last",
    )
    assert tuned.logits.shape == before.shape
    assert not torch.allclose(tuned.logits, before)
    assert torch.equal(outputs(backbone, split.test), before)
    assert tuned.record["test"]["accuracy"] >= 0


def test_a_saved_model_is_the_whole_language_model(tmp_path):
    path, model = causal_checkpoint(tmp_path / "start", tie_word_embeddings=True)
    split = reviews(4, prompt=SEVERAL, labels=LABELS)
    backbone = load_backbone(path, split)
    method = parse_method("full")
    record = {
        "model": path,
        "task": "tiny",
        "labels": LABELS,
        "readout": "causal",
        "test": {"accuracy": 0.0},
        "parameters": {"trainable": 1, "without_head": 1},
        "learning_rate": 0.0,
        "examples": {"dev": 0, "test": 4},
        "seed": 0,
    }
    found = outputs(backbone, split.test)
    labels = torch.zeros(len(found), dtype=torch.long)
    tuned = FineTuned(backbone.module, method, found, labels, record)
    (tmp_path / "out").mkdir()
    write_results(tmp_path / "out", tuned, backbone.tokenizer, record)
    saved = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name
    assert torch.equal(outputs(backbone, split.test), found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", [SINGLE, SEVERAL])
def test_the_padding_side_of_the_tokenizer_does_not_matter(tmp_path, side, prompt):
    path, model = causal_checkpoint(tmp_path, "GPT2")
    file = Path(path) / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"padding_side": side}
    file.write_text(json.dumps(settings))
    assert tf.AutoTokenizer.from_pretrained(path).padding_side == side
    split = reviews(5, prompt=prompt, labels=LABELS[: len(prompt.words)])
    backbone = load_backbone(path, split)
    (batch,), _ = backbone.encode(split.train, 5)
    assert not batch["attention_mask"].all()
    alone = torch.cat([outputs(backbone, [example]) for example in split.train])
    assert_close(outputs(backbone, split.train, 5), alone, 1e-5)
    if prompt is SEVERAL:
        for row, example in zip(alone, split.train, strict=True):
            assert_close(row.double(), likelihoods(backbone, model, example.a), 1e-5)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_the_start_is_the_tokenizer_s_own_and_the_end_is_removed(tmp_path, start, end):
    path, _ = causal_checkpoint(tmp_path, start=start, end=end)
    split = reviews(4, prompt=SINGLE)
    backbone = load_backbone(path, split, max_length=8)
    batches, order = backbone.encode([*split.train, replace(split.train[0])], 1)
    for batch, i in zip(batches, order, strict=True):
        tokens = batch["input_ids"][0].tolist()
        assert tokens.count(0) == start
        assert tokens[0] == 0 or not start
        assert 1 not in tokens
        assert len(tokens) <= 8
        last = tokens[int(batch["position"])]
        assert backbone.tokenizer.convert_ids_to_tokens(last) == "was"
        assert i in range(5)


# What is refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("great", "great"), "'great', 'great' are not distinct tokens"),
        (("greatly fine", "Greatly fine"), "are not distinct tokens"),
        (("unheard", "great"), "'unheard' is not one token .*unk"),
        (("fine unheard", "great"), r"'fine unheard' has parts .*\['fine', '<unk>'\]"),
        (("great", "greatly"), "'greatly' begins with label word 'great'"),
        (("", "great"), "label word '' is not one token"),
    ],
)
def test_refused_words_of_a_causal_model(tmp_path, words, message):
    path, _ = causal_checkpoint(tmp_path)
    split = reviews(prompt=replace(SENTIMENT, words=words))
    with pytest.raises(BackboneError, match=f"(?i){message}.*--label-words"):
        load_backbone(path, split)


def test_words_of_several_tokens_are_refused_for_a_masked_model(tmp_path):
    path, _ = checkpoint(tmp_path, "BertForMaskedLM")
    split = reviews(prompt=replace(SENTIMENT, words=("great fun", "dull")))
    with pytest.raises(
        BackboneError, match=r"'great fun' is not one .*\['great', 'fun'\].*--readout"
    ):
        load_backbone(path, split)
