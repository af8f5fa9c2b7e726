"""From a model and a split to a record: order, heads, kinds, and what is measured."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import checkpoint, reviews
from dense import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk.kernels.empirical import empirical_ntk
from ntk.kernels.options import KINDS, KernelOptions
from ntk.kernels.spot_check import SpotCheckError
from ntk.scale.resources import Resources
from ntk.scale.run import kernels
from ntk.spaces.kinds import Bias, Columns, Full, Head, LoRA, Rows
from ntk.studies.comparison import record
from ntk.studies.comparison.findings import summary_lines
from ntk.studies.comparison.record import evaluate
from ntk.studies.comparison.report import rows, write_report
from ntk.studies.comparison.subject import Comparison
from rocoft.models.architecture import Architecture
from rocoft.models.backbone import load_backbone

REQUESTED = (Rows(2), Columns(1).layers(0) + Bias(), LoRA(1))
SPLIT = reviews(8, test=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return checkpoint(tmp_path_factory.mktemp("body"))[0]


def load(folder, split=SPLIT, **options):
    return load_backbone(folder, split, dtype=torch.float64, **options)


def evaluated(backbone, split, requested, *, offset=False, progress=None, **options):
    how = {k: options.pop(k) for k in ("kind", "implementation") if k in options}
    how = KernelOptions(**how)
    compared = Comparison.of(backbone, split, requested, options=how, **options)
    computation = kernels(compared.work, progress=progress)
    return evaluate(compared, computation, offset=offset, progress=progress)


@pytest.fixture(scope="module")
def evaluation(folder):
    return evaluated(load(folder), SPLIT, REQUESTED, batch_size=3)


def one_by_one(backbone, split=SPLIT):
    """Return every example of the split as a batch of its own, in order."""
    examples = (*split.train, *split.test)
    return [backbone.encode([example], 1)[0][0] for example in examples]


def kernels_one_by_one(backbone, spaces, split=SPLIT):
    batches = one_by_one(backbone, split)
    train = batches[: len(split.train)]
    return empirical_ntk(
        backbone.module,
        batches,
        train,
        space=spaces,
        implementation="jacobian",
        reduce="contrast",
    )


@settings(max_examples=3)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["sgd", "signgd"]))
def test_what_is_added_to_all_outputs_changes_no_number(folder, seed, kind):
    """Softmax ignores it. The function uses the model's own parameters, too."""
    split = reviews(4, test=3)
    direction = torch.randn(
        2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )

    def shifted(module, arguments, output):
        logits = output if isinstance(output, torch.Tensor) else output.logits
        more = logits + 3 * (logits @ direction).square()[:, None] + 1
        return more if logits is output else replace(output, logits=more)

    plain = load(folder, split)
    records = [evaluated(plain, split, [Rows(2)], offset=True, kind=kind).record]
    with plain.module.register_forward_hook(shifted):
        records.append(
            evaluated(plain, split, [Rows(2)], offset=True, kind=kind).record
        )
    first, second = map(numbers, records)
    assert len(first) > 100
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def numbers(value, name=""):
    """Return every number of a record but times and errors of rounding, by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    elif isinstance(value, int | float):
        return {name: float(value)}
    else:
        return {}
    return {
        path: number
        for key, part in items
        if key not in {"timing", "certificate", "tolerance"}
        for path, number in numbers(part, f"{name}.{key}").items()
    }


def entries(evaluation):
    return {entry["label"]: entry for entry in evaluation.record["spaces"]}


def test_kernels_are_in_the_order_of_the_split(folder, evaluation):
    backbone = load(folder)
    order = backbone.encode(SPLIT.train, 3)[1]
    assert order != sorted(order)  # else this test could not fail
    spaces = {
        "full": Full(),
        "head": Head(),
        "bias": Bias() + Head(),
        **{space.name: space + Head() for space in REQUESTED},
    }
    expected = kernels_one_by_one(backbone, spaces)
    assert set(evaluation.kernels) == set(spaces)
    for name, kernel in evaluation.kernels.items():
        assert kernel.shape == (13, 8, 1, 1)
        assert_close(kernel, expected[name], of=name)


def test_batches_make_no_difference(folder, evaluation):
    other = evaluated(load(folder), SPLIT, REQUESTED, batch_size=32)
    for name, kernel in evaluation.kernels.items():
        assert_close(other.kernels[name], kernel, of=name)


def test_entries(evaluation):
    found = entries(evaluation)
    roles = {label: entry["role"] for label, entry in found.items()}
    assert roles == {
        "full": "reference",
        "rows:2": "requested",
        "columns:1/layers=0+bias": "requested",
        "lora:1": "requested",
        "head": "control",
        "bias": "control",
    }
    assert found["rows:2"]["name"] == "rows:2+head"
    # Two rows of six weights in two blocks: 5 of them read 16 features, one 24.
    assert found["rows:2"]["parameters"] == 2 * 2 * (5 * 16 + 24) + 34
    assert found["head"]["parameters"] == 34
    for label, entry in found.items():
        assert entry["certificate"]["relative_error"] < 1e-9, label
        trace = float(torch.einsum("nncc->", evaluation.kernels[label][:8]))
        assert sum(entry["trace_by_layer"].values()) == pytest.approx(trace), label
        for classifier in ("ridge", "logistic", "svm"):
            assert 0 <= entry["classifiers"][classifier]["accuracy"] <= 1
    assert found["full"]["share"] == 1
    assert found["full"]["distance"]["frobenius"] == pytest.approx(0, abs=1e-9)
    assert found["rows:2"]["distance"]["frobenius"] > 1e-3


def test_layers_of_the_trace(evaluation):
    found = entries(evaluation)
    assert list(found["head"]["trace_by_layer"]) == ["head"]
    assert {"layer 0", "layer 1", "head"} == set(found["rows:2"]["trace_by_layer"])


def test_accuracy_of_the_model_itself(folder, evaluation):
    backbone = load(folder)
    with torch.no_grad():
        answers = [
            int(backbone.module(**batch).logits.argmax())
            for batch in one_by_one(backbone)[8:]
        ]
    right = [a == e.label for a, e in zip(answers, SPLIT.test, strict=True)]
    assert evaluation.record["f0"]["accuracy"] == sum(right) / len(right)


def test_random_selections_and_shuffled_labels(evaluation):
    random = evaluation.record["random"]
    assert [(r["axis"], r["count"], r["seeds"]) for r in random] == [
        ("columns", 1, 5),
        ("rows", 2, 5),
    ]
    assert random[0]["frobenius_rescaled"]["mean"] > 0
    assert evaluation.record["shuffled"]["ridge"]["draws"] == 10


def test_record_is_plain(evaluation):
    text = json.dumps(evaluation.record)
    assert json.dumps(json.loads(text)) == text  # NaN is not equal to itself


def test_without_head_no_space_holds_it(folder):
    fresh = load(folder)
    evaluation = evaluated(load(folder), SPLIT, REQUESTED, with_head=False)
    spaces = {"full": Full(), "head": Head(), "rows:2": Rows(2), "lora:1": LoRA(1)}
    expected = kernels_one_by_one(fresh, spaces)
    found = evaluation.kernels
    assert_close(found["full"], expected["full"] - expected["head"], 1e-8)
    assert_close(found["rows:2"], expected["rows:2"])
    assert_close(found["lora:1"], expected["lora:1"])
    record = entries(evaluation)
    total = sum(p.numel() for p in fresh.module.parameters())
    assert record["full"]["parameters"] == total - 34
    assert not evaluation.record["kernel"]["with_head"]
    assert "head" not in record


def test_without_head_the_biases_are_those_of_the_body(folder):
    evaluation = evaluated(load(folder), SPLIT, REQUESTED, with_head=False)
    fresh = load(folder)
    architecture = Architecture(fresh.module)
    body = [n for n in architecture.biases if n not in architecture.head]
    expected = kernels_one_by_one(fresh, {"bias": Bias().at(*body)})["bias"]
    sizes = sum(architecture.parameters[name].numel() for name in body)
    entry = entries(evaluation)["bias"]
    assert "head" not in entry["trace_by_layer"]
    assert entry["parameters"] == sizes
    assert_close(evaluation.kernels["bias"], expected)


@pytest.mark.parametrize("with_head", [True, False])
def test_the_model_is_left_as_it_was(folder, with_head):
    backbone = load(folder)
    evaluated(backbone, SPLIT, [Rows(1)], with_head=with_head)
    assert all(p.requires_grad for p in backbone.module.parameters())
    assert not backbone.module.training


def test_own_head_is_in_the_full_kernel_alone(tmp_path):
    folder, _ = checkpoint(tmp_path, "BertForSequenceClassification")
    backbone = load(folder)
    evaluation = evaluated(backbone, SPLIT, [Rows(2)])
    expected = kernels_one_by_one(backbone, {"full": Full(), "rows:2": Rows(2)})
    for name in expected:
        assert_close(evaluation.kernels[name], expected[name], of=name)
    assert entries(evaluation)["rows:2"]["name"] == "rows:2"


def test_a_zero_kernel_is_a_dash_and_not_the_end(tmp_path):
    folder, model = checkpoint(tmp_path, "BertForSequenceClassification")
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(folder)
    evaluation = evaluated(load(folder), SPLIT, [Rows(2)])
    zero, full = (entries(evaluation)[name] for name in ("rows:2", "full"))
    assert not evaluation.kernels["rows:2"].any()
    assert zero["zero"]
    assert zero["distance"] is zero["spectrum"] is zero["alignment"] is None
    assert set(zero["classifiers"].values()) == {None}
    assert full["classifiers"]["ridge"]["accuracy"] >= 0
    (row,) = [row for row in rows(evaluation.record)[1] if row.label == "rows:2"]
    cells = {title: value for title, (value, _) in row.cells.items()}
    assert {v for t, v in cells.items() if t not in {"parameters", "%"}} == {"–"}
    lines = summary_lines(evaluation.record)
    assert any("is zero: the outputs depend on none of them" in line for line in lines)


def test_a_zero_full_kernel_leaves_nothing_to_compare(folder, monkeypatch):
    computed = kernels

    def zeros(work, **options):
        found = computed(work, **options)
        for kernel in found.result.kernels.values():
            kernel.zero_()
        return found

    monkeypatch.setitem(evaluated.__globals__, "kernels", zeros)
    monkeypatch.setattr(record, "require_small_errors", lambda *_: None)
    with pytest.raises(ValueError, match="over all parameters is zero"):
        evaluated(load(folder), SPLIT, [Rows(2)])


@pytest.mark.parametrize(
    "implementation", ["jacobian", pytest.param("jvp", marks=pytest.mark.slow)]
)
def test_implementations_agree(folder, evaluation, implementation):
    other = evaluated(
        load(folder), SPLIT, [Rows(2)], implementation=implementation, batch_size=5
    )
    for name, kernel in other.kernels.items():
        assert_close(kernel, evaluation.kernels[name], of=name)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_kinds(folder, kind, tmp_path):
    evaluation = evaluated(load(folder), SPLIT, [Rows(2)], kind=kind)
    record = evaluation.record
    entry = entries(evaluation)["rows:2"]
    assert entry["certificate"]["relative_error"] < 1e-9
    json.dumps(record)
    measured = kind != "asymmetric_signgd"
    for key in ("distance", "spectrum", "alignment"):
        assert (entry[key] is not None) == measured
    assert (entry["classifiers"]["ridge"] is not None) == measured
    assert bool(record["random"]) == measured
    assert (record["shuffled"] is not None) == measured
    assert summary_lines(record)
    assert all(f.is_file() for f in write_report(record, tmp_path).values())


def test_kernels_that_the_definition_contradicts_make_no_record(folder):
    compared = Comparison.of(load(folder), SPLIT, [Rows(2)])
    computation = kernels(compared.work)
    evaluate(compared, computation)
    computation.result.kernels["rows:2"] *= 1.1
    with pytest.raises(SpotCheckError, match=r"over rows:2 is wrong.*--no-cache"):
        evaluate(compared, computation)


def test_kinds_differ(folder, evaluation):
    other = evaluated(load(folder), SPLIT, [Rows(2)], kind="asymmetric_signgd")
    batches = one_by_one(load(folder))
    expected = empirical_ntk(
        load(folder).module,
        batches,
        batches[:8],
        space=Rows(2) + Head(),
        kind="asymmetric_signgd",
        reduce="contrast",
        implementation="jacobian",
    )
    assert_close(other.kernels["rows:2"], expected)
    assert not torch.allclose(other.kernels["rows:2"], evaluation.kernels["rows:2"])


def test_three_labels(folder):
    split = reviews(12, test=5, labels=("bad", "good", "ok"))
    evaluation = evaluated(load(folder, split), split, [Rows(2)])
    assert evaluation.kernels["full"].shape == (17, 12, 2, 2)
    assert evaluation.record["task"]["outputs"] == 3
    entry = entries(evaluation)["rows:2"]
    for classifier in ("ridge", "logistic", "svm"):
        assert entry["classifiers"][classifier]["accuracy"] > 0.5, classifier
    json.dumps(evaluation.record)


def test_offset(folder, evaluation):
    """With the probe's own outputs to start from, the training set is all right."""
    other = evaluated(load(folder), SPLIT, REQUESTED, offset=True)
    assert other.record["kernel"]["offset"]
    assert_close(other.kernels["full"], evaluation.kernels["full"])
    found, plain = entries(other)["full"], entries(evaluation)["full"]
    assert found["classifiers"]["svm"] == plain["classifiers"]["svm"]
    assert found["classifiers"]["ridge"] != plain["classifiers"]["ridge"]


def test_data_strategies_are_fixed_on_the_training_examples(folder):
    asked = Rows(1, strategy="gradient")
    evaluation = evaluated(load(folder), SPLIT, [asked])
    entry = entries(evaluation)[asked.name]
    assert entry["name"] == "rows/calibrated+head"
    assert entry["certificate"]["relative_error"] < 1e-9


def test_progress_ends_at_its_total(folder):
    calls = {}

    def progress(what, done, total):
        assert calls.get(what, (0, total)) <= (done, total)
        calls[what] = (done, total)

    evaluated(load(folder), SPLIT, [Rows(1)], progress=progress)
    assert "measures" in calls
    for what, (done, total) in calls.items():
        assert done == total, what


def test_processes_with_other_weights_are_refused(folder):
    class Others:
        size, is_first = 2, True

        def gather(self, key):
            return [key, key[::-1]]

    compared = Comparison.of(load(folder), SPLIT, [Rows(1)])
    with pytest.raises(ValueError, match="do not have the same weights"):
        kernels(compared.work, Resources(processes=Others()))
