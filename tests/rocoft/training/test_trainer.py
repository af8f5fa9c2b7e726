"""Fine-tuning: what is learnt, what is left alone, what the record says."""

import copy
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers as tf
from cases import SHORT, sizes
from checkpoints import SENTIMENT, STORIES, checkpoint, needs_stories, outputs, reviews
from peft import PeftModel, get_peft_model
from sklearn.linear_model import LogisticRegression

from rocoft.adapter.config import RoCoFTConfig
from rocoft.data.metrics import scores
from rocoft.data.splits import Split, few_shot, full_split
from rocoft.data.tasks import Example, Task, TaskError, load_file
from rocoft.models.backbone import load_backbone
from rocoft.training.methods import apply_method, parse_method, trained_parameters
from rocoft.training.search import TrainingError
from rocoft.training.trainer import count_parameters, fine_tune

QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 4}
METHODS = ("rows:2", "columns:2", "rows:1+columns:1", "auto:2", "rows:2+bias", "lora:2")
METHODS += ("dora:2", "bitfit", "head", "full", "masked rows:2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return checkpoint(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def split():
    drawn = reviews(24, test=12)
    dev = reviews(32, test=0).train[24:]
    return replace(drawn, dev=dev)


@pytest.fixture(scope="module")
def backbone(folder, split):
    return load_backbone(folder, split, head="random")


def weights(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


# These learn as the others do, and test_merging trains them too.
MORE = {"columns:2", "rows:1+columns:1", "rows:2+bias", "dora:2"}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=pytest.mark.slow if m in MORE else ())
        for m in (*METHODS, "probe")
    ],
)
def test_every_method_learns_and_leaves_the_backbone_alone(backbone, split, method):
    before = weights(backbone.module)
    flags = {n: p.requires_grad for n, p in backbone.module.named_parameters()}
    arguments = {**QUICK, "num_train_epochs": 20, "lr_scheduler_type": "constant"}
    rate = 1e-2 if method in ("full", "masked rows:2", "rows:2+bias") else 5e-2
    tuned = fine_tune(backbone, split, method, lrs=[rate], arguments=arguments)
    for name, parameter in backbone.module.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == flags[name]
    assert not tuned.model.training
    if method not in ("head", "probe"):
        # The tiny model's features are random: its head alone need not learn.
        assert tuned.record["dev"]["accuracy"] >= 0.75, tuned.record["dev"]
    # The logits are those of the model that is returned, in the order of the split.
    found = outputs(replace(backbone, module=tuned.model), split.test)
    torch.testing.assert_close(tuned.logits, found, rtol=1e-5, atol=1e-5)
    assert tuned.labels.tolist() == [example.label for example in split.test]
    labels = [example.label for example in split.test]
    assert tuned.record["test"] == scores(found, labels, ("accuracy",))
    json.dumps(tuned.record, allow_nan=False, default=str)


def test_predictions_keep_their_order_where_training_is_sampled_by_length(
    backbone, split
):
    long = [
        replace(e, a=" ".join([e.a] * (1 + i % 3))) for i, e in enumerate(split.test)
    ]
    mixed = replace(split, test=tuple(long))
    arguments = {**QUICK, "train_sampling_strategy": "group_by_length"}
    arguments["per_device_eval_batch_size"] = 2
    tuned = fine_tune(backbone, mixed, "rows:2", lrs=[1e-2], arguments=arguments)
    found = outputs(replace(backbone, module=tuned.model), mixed.test)
    torch.testing.assert_close(tuned.logits, found, rtol=1e-5, atol=1e-5)


def test_rows_are_trained_as_masked_gradients_train_them(backbone, split):
    runs = [
        fine_tune(backbone, split, method, lrs=[1e-2], arguments=QUICK)
        for method in ("rows:2+columns:2", "masked rows:2+columns:2")
    ]
    torch.testing.assert_close(runs[0].logits, runs[1].logits, rtol=1e-4, atol=1e-5)
    assert (runs[0].logits - _logits(backbone, split.test)).abs().max() > 1e-3


def _logits(backbone, examples):
    return outputs(backbone, examples)


def test_one_step_is_the_optimizer_by_hand(folder, split):
    backbone = load_backbone(folder, split, head="random", dtype=torch.float64)
    # Dropout would need the Trainer's random numbers.
    for module in backbone.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": len(split.train),
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    tuned = fine_tune(backbone, split, "full", lrs=[1e-3], arguments=arguments)
    module = copy.deepcopy(backbone.module)
    (batch,), order = backbone.encode(split.train, len(split.train))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0)
    labels = torch.tensor([split.train[i].label for i in order])
    # The loss of a float32 model is in float32.
    F.cross_entropy(module(**batch).logits.float(), labels).backward()
    optimizer.step()
    for (name, found), expected in zip(
        tuned.model.named_parameters(), module.parameters(), strict=True
    ):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_the_learning_rate_is_chosen_on_dev(backbone, split):
    tuned = fine_tune(backbone, split, "rows:2", lrs=[0.0, 3e-2, 1e-9], arguments=QUICK)
    runs = tuned.record["learning_rates"]
    rates = [run["learning_rate"] for run in runs]
    # Beyond the highest the grid is extended, if that is the best.
    assert rates[:3] == [0.0, 3e-2, 1e-9]
    best = max(run["dev"]["accuracy"] for run in runs)
    equal = [r["learning_rate"] for r in runs if r["dev"]["accuracy"] == best]
    inside = [rate for rate in equal if min(rates) < rate < max(rates)]
    chosen = tuned.record["learning_rate"]
    assert chosen == (inside or equal)[0]
    end = tuned.record["rate_at_end"]
    assert (end is None) == bool(inside)
    again = fine_tune(backbone, split, "rows:2", lrs=[chosen], arguments=QUICK)
    assert again.record["rate_at_end"] is None
    assert torch.equal(again.logits, tuned.logits)


def test_the_best_checkpoint_on_dev_is_taken(backbone, split):
    # So high a rate is not steady.
    arguments = {**QUICK, "num_train_epochs": 8, "lr_scheduler_type": "constant"}
    tuned = fine_tune(backbone, split, "full", lrs=[3e-2], arguments=arguments)
    (run,) = tuned.record["learning_rates"]
    curve = [entry["accuracy"] for entry in run["history"]]
    assert len(curve) == 8
    assert len(set(curve)) > 1
    assert tuned.record["dev"]["accuracy"] == max(curve)
    found = outputs(replace(backbone, module=tuned.model), split.dev)
    labels = [example.label for example in split.dev]
    assert scores(found, labels, ("accuracy",))["accuracy"] == max(curve)


def test_patience_stops_early(backbone, split):
    arguments = {**QUICK, "num_train_epochs": 9}
    tuned = fine_tune(
        backbone, split, "rows:2", lrs=[0.0], arguments=arguments, patience=2
    )
    assert tuned.record["epochs"] == 3.0


def test_seeds_repeat_and_leave_the_random_numbers_alone(backbone, split):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    runs = [
        fine_tune(backbone, split, "lora:2", lrs=[1e-2], arguments=QUICK, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert not torch.equal(runs[0].logits, runs[2].logits)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_diverged_rate_is_not_chosen(backbone, split):
    tuned = fine_tune(backbone, split, "full", lrs=[1e30, 1e-4], arguments=QUICK)
    assert tuned.record["learning_rate"] == 1e-4
    assert tuned.record["learning_rates"][0]["dev"] is None
    with pytest.raises(TrainingError, match="diverged with every learning rate"):
        fine_tune(backbone, split, "full", lrs=[1e30], arguments=QUICK)


@pytest.mark.parametrize("method", ["rows:1", "full", "bitfit"])
def test_label_words_are_learnt(tmp_path, method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = checkpoint(tmp_path / "masked", "BertForMaskedLM")[0]
    prompt = replace(SENTIMENT, template="{a} it was {mask}")
    drawn = reviews(24, prompt=prompt, test=4)
    split = replace(drawn, dev=drawn.train[:8])
    backbone = load_backbone(folder, split)
    assert backbone.readout == "masked"
    arguments = {**QUICK, "num_train_epochs": 10}
    tuned = fine_tune(backbone, split, method, lrs=[3e-2], arguments=arguments)
    assert tuned.record["dev"]["accuracy"] >= 0.75
    found = outputs(replace(backbone, module=tuned.model), split.test)
    torch.testing.assert_close(tuned.logits, found, rtol=1e-5, atol=1e-5)
    if method == "full":
        # The label words' rows are those of the embedding, before and after.
        names = dict(tuned.model.named_parameters(remove_duplicate=False))
        tied = [
            n
            for n in names
            if names[n] is tuned.model.model.get_input_embeddings().weight
        ]
        assert len(tied) == 2


@pytest.mark.parametrize("readout", ["head", "masked"])
def test_rows_of_the_largest_gradients_are_trained(tmp_path, readout, split):
    kind = {"head": "BertForSequenceClassification", "masked": "BertForMaskedLM"}
    prompt = replace(SENTIMENT, template="{a} it was {mask}")
    drawn = reviews(24, prompt=prompt if readout == "masked" else None, test=4)
    few = replace(drawn, dev=split.dev)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = checkpoint(tmp_path / "model", kind[readout])[0]
    backbone = load_backbone(folder, few, head="random")
    method = "rows:1/strategy=gradient"
    tuned = fine_tune(backbone, few, method, lrs=[1e-2], arguments=QUICK)
    model, energy = copy.deepcopy(backbone.module), {}
    for example in few.train:
        model.zero_grad()
        batch = backbone.encode([example], 1)[0][0]
        out = model(**batch)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        F.cross_entropy(logits, torch.tensor([example.label])).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                square = parameter.grad.double().square()
                energy[name] = energy.get(name, 0) + square
    found = {
        name.replace("base_model.model.", ""): indices
        for name, indices in tuned.model.named_buffers()
        if "rocoft_row_indices" in name
    }
    assert len(found) == 12
    for name, indices in found.items():
        weight = name.partition(".rocoft_row_indices")[0] + ".weight"
        assert indices.tolist() == [int(energy[weight].sum(1).argmax())], name


def test_the_probe_is_a_logistic_regression(folder, split):
    backbone = load_backbone(folder, split, head="random")
    tuned = fine_tune(backbone, split, "probe")
    layer = backbone.module.classifier
    backbone.module.classifier = torch.nn.Identity()
    features = [
        outputs(backbone, p).double().numpy() for p in (split.train, split.test)
    ]
    backbone.module.classifier = layer
    machine = LogisticRegression(max_iter=5000)
    machine.fit(features[0], [e.label for e in split.train])
    margins = machine.decision_function(features[1])
    found = (tuned.logits[:, 1] - tuned.logits[:, 0]).numpy()
    np.testing.assert_allclose(found, margins, rtol=1e-3, atol=1e-4)
    assert tuned.record["parameters"]["trainable"] == 34


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_no_weight(backbone, split, checkpointing):
    arguments = {**QUICK, "gradient_checkpointing": checkpointing}
    tuned = fine_tune(backbone, split, "rows:2", lrs=[1e-2], arguments=arguments)
    plain = fine_tune(backbone, split, "rows:2", lrs=[1e-2], arguments=QUICK)
    torch.testing.assert_close(tuned.logits, plain.logits, rtol=1e-5, atol=1e-6)


# Regression.


@pytest.fixture
def similar(tmp_path):
    rows = []
    for i in range(40):
        score = (i % 9) * 0.5
        rows.append(
            {"text": "the film was " + "very " * (i % 9) + "fun", "label": score}
        )
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_regression_is_learnt_by_squared_error(folder, similar):
    task = load_file(similar, regression=True)
    assert task.regression
    split = full_split(task, seed=0)
    backbone = load_backbone(folder, split, head="random")
    arguments = {**QUICK, "num_train_epochs": 30}
    tuned = fine_tune(backbone, split, "full", lrs=[1e-2], arguments=arguments)
    assert tuned.logits.shape == (8, 1)
    assert tuned.record["metric"] == "pearson"
    assert tuned.record["test"]["pearson"] > 0.7
    dev = outputs(replace(backbone, module=tuned.model), split.dev)[:, 0]
    wanted = torch.tensor([example.label for example in split.dev])
    loss = float(F.mse_loss(dev, wanted))
    assert tuned.record["dev"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_regressions_are_refused_where_classes_are_expected(similar, folder):
    with pytest.raises(TaskError, match="Regression is not supported"):
        load_file(similar)
    task = load_file(similar, regression=True)
    with pytest.raises(TaskError, match="it has no labels of which to draw"):
        few_shot(task, 2, 2, 0)
    split = full_split(task, seed=0)
    with pytest.raises(TrainingError, match="'probe' fits a classification head"):
        fine_tune(load_backbone(folder, split, head="random"), split, "probe")


# Splits.


def _task(count, test=0, classes=3):
    examples = [Example(f"text {i}", None, i % classes) for i in range(count + test)]
    names = tuple(f"label {i}" for i in range(classes))
    return Task(
        "many", names, tuple(examples[:count]), tuple(examples[count:]), None, ""
    )


@pytest.mark.parametrize("test", [0, 30])
def test_full_splits_are_disjoint_and_stratified(test):
    task = _task(90, test)
    first, second = (full_split(task, seed=seed) for seed in (0, 1))
    for split in (first, second):
        examples = [*split.train, *split.dev, *split.test]
        assert len(examples) == len(set(examples)) == 90 + test
        assert {e.label for e in split.dev} == {0, 1, 2}
        if test:
            assert set(split.test) == set(task.test)
            counts = [sum(e.label == label for e in split.dev) for label in range(3)]
            assert counts == [3, 3, 3]
    assert first.test == second.test
    assert set(first.dev) != set(second.dev)


def test_few_shot_dev_is_other_examples_of_every_label():
    task = _task(60, 30)
    without, split = few_shot(task, 4, 10, 7), few_shot(task, 4, 10, 7, dev_shots=5)
    assert split.train == without.train
    assert split.test == without.test
    assert not set(split.train) & set(split.dev)
    assert [e.label for e in split.dev] == [0] * 5 + [1] * 5 + [2] * 5
    alone = few_shot(_task(60), 4, 100, 7, dev_shots=5)
    assert not set(alone.test) & {*alone.train, *alone.dev}
    with pytest.raises(TaskError, match="fewer than shots=16 and dev_shots=16"):
        few_shot(task, 16, 10, 7, dev_shots=16)


# What is refused.


def test_refused(backbone, split):
    with pytest.raises(TrainingError, match="has no dev examples to choose"):
        fine_tune(backbone, Split(split.task, split.train, split.test, 0), "rows:1")
    with pytest.raises(TrainingError, match="arguments learning_rate are set by"):
        fine_tune(backbone, split, "rows:1", arguments={"learning_rate": 1.0})
    with pytest.raises(TrainingError, match="unexpected keyword argument 'epochs'"):
        fine_tune(backbone, split, "rows:1", arguments={"epochs": 1})
    with pytest.raises(TrainingError, match="no learning rate was given"):
        fine_tune(backbone, split, "rows:1", lrs=[])


def test_weight_decay_of_masked_gradients_is_refused(backbone, split):
    arguments = {**QUICK, "weight_decay": 0.1}
    with pytest.raises(TrainingError, match=r"weight_decay=0.1 .* train 'rows:2',"):
        fine_tune(backbone, split, "masked rows:2", lrs=[1e-2], arguments=arguments)


def test_biases_of_a_language_models_head_are_of_the_head(tmp_path):
    folder = checkpoint(tmp_path / "masked", "BertForMaskedLM")[0]
    prompt = replace(SENTIMENT, template="{a} it was {mask}")
    backbone = load_backbone(folder, reviews(4, prompt=prompt))
    biases = {
        name: parameter.numel()
        for name, parameter in backbone.module.named_parameters()
        if name.endswith("bias")
    }
    of_head = sum(count for name, count in biases.items() if ".cls." in name)
    for method in ("rows:3+bias", "bitfit"):
        model = copy.deepcopy(backbone.module)
        model = apply_method(model, parse_method(method), train_head=False)
        found = count_parameters(model, backbone.module)
        assert found["head"] == of_head > 0, method
        rows = 2 * 3 * (5 * 16 + 24) if method.startswith("rows") else 0
        assert found["trainable"] == sum(biases.values()) + rows


def test_masked_gradients_leave_the_rest_as_it_was(backbone):
    method = parse_method("masked rows:2/strategy=random/seed=5")
    module = apply_method(copy.deepcopy(backbone.module), method, train_head=True)
    before = weights(module)
    optimizer = torch.optim.AdamW(trained_parameters(module).values(), weight_decay=0.0)
    (batch,), _ = backbone.encode([Example("the film was fine", None, 1)] * 2, 2)
    for _ in range(3):
        module(**batch).logits[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in module.named_parameters():
        changed = (parameter != before[name]).reshape(len(parameter), -1).any(1)
        if ".layer." in name and parameter.ndim == 2:
            assert 1 <= changed.sum() <= 2, name
        elif "classifier" not in name:
            assert not changed.any(), name


# Other tasks go through peft and the library's own Trainer.


@pytest.mark.parametrize("axis", ["row", "column", "both", "auto"])
@pytest.mark.parametrize("task", ["TokenClassification", "QuestionAnswering"])
def test_other_auto_classes_train_with_the_plain_trainer(tmp_path, task, axis):
    config = tf.BertConfig(**sizes(SHORT), num_labels=2)
    kind = getattr(tf, f"AutoModelFor{task}")
    model = kind.from_config(config)
    start = copy.deepcopy(model)
    tokens = torch.randint(4, 60, (16, 6))
    if task == "TokenClassification":
        rows = [{"input_ids": t, "labels": (t > 30).long()} for t in tokens]
        kwargs = {"task_type": "TOKEN_CLS"}
    else:
        answers = tokens.argmax(1)
        rows = [
            {"input_ids": t, "start_positions": a, "end_positions": a}
            for t, a in zip(tokens, answers, strict=True)
        ]
        kwargs = {"task_type": "QUESTION_ANS"}
    peft_model = get_peft_model(model, RoCoFTConfig(r=2, axis=axis, **kwargs))
    arguments = tf.TrainingArguments(
        str(tmp_path / "out"),
        num_train_epochs=20,
        learning_rate=3e-2,
        use_cpu=True,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        disable_tqdm=True,
        save_total_limit=1,
    )
    trainer = tf.Trainer(peft_model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.8 * before
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(start, tmp_path / "adapter").eval()
    with torch.no_grad():
        found, expected = (m.eval()(tokens) for m in (loaded, peft_model))
    for name in found.keys() - {"loss"}:
        assert torch.equal(found[name], expected[name]), name


@needs_stories
def test_trl_takes_the_configuration(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    model = tf.AutoModelForCausalLM.from_pretrained(STORIES)
    before = weights(model)
    rows = [
        {"prompt": f"{name} saw a", "completion": " big red dog."}
        for name in ("Lily", "Tom", "Sue", "Ben") * 4
    ]
    arguments = trl.SFTConfig(
        str(tmp_path / "out"),
        num_train_epochs=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tf.AutoTokenizer.from_pretrained(STORIES),
        peft_config=RoCoFTConfig(r=3, axis="auto", task_type="CAUSAL_LM"),
    )
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 3
    trained = trained_parameters(trainer.model)
    assert trained
    assert all(".rocoft_" in name for name in trained)
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = tf.AutoModelForCausalLM.from_pretrained(STORIES)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    tokens = torch.tensor([[1, 40, 50, 60]])
    with torch.no_grad():
        found, expected = (m.eval()(tokens).logits for m in (loaded, trainer.model))
    assert torch.equal(found, expected)
    frozen = {n: p for n, p in fresh.named_parameters() if ".rocoft_" not in n}
    for name, parameter in frozen.items():
        assert torch.equal(parameter, before[name.replace("base_layer.", "")]), name
