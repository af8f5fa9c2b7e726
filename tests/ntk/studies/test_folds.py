"""Kernels under heads that were fitted without a fold, against fitting by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import checkpoint, reviews
from dense import assert_close
from numpy.testing import assert_allclose

from ntk.kernels.empirical import empirical_ntk
from ntk.kernels.options import KernelOptions
from ntk.scale.resources import Resources
from ntk.scale.run import kernels
from ntk.spaces.kinds import Full, Rows
from ntk.studies.comparison.record import evaluate, fold_kernels
from ntk.studies.comparison.subject import Comparison
from ntk.studies.folder import Cell
from ntk.studies.folds import block_diagonal, outputs_out_of_fold
from ntk.studies.layers.records import LayerKernels, layer_records
from ntk.studies.protocol import Protocol
from rocoft.data.splits import few_shot, stratified_folds
from rocoft.data.tasks import TaskError, load_task
from rocoft.models.backbone import load_backbone
from rocoft.models.probe import fit_probe

SPLIT = reviews(8, test=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return checkpoint(tmp_path_factory.mktemp("body"))[0]


def load(folder, **options):
    return load_backbone(folder, SPLIT, dtype=torch.float64, **options)


def test_each_fold_has_a_head_of_its_own_and_the_model_is_as_before(folder):
    backbone = load(folder)
    before = {k: v.clone() for k, v in backbone.module.state_dict().items()}
    compared = Comparison.of(backbone, SPLIT, [Rows(2)], batch_size=3)
    folds = fold_kernels(compared, Resources())
    for name, value in backbone.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [fold.held for fold in folds.entries] == stratified_folds(SPLIT)
    batches = [backbone.encode([example], 1)[0][0] for example in SPLIT.train]
    for fold in folds.entries:
        by_hand = load(folder)
        rest = [e for i, e in enumerate(SPLIT.train) if i not in fold.held]
        fit_probe(by_hand, SPLIT.task, rest)
        expected = empirical_ntk(
            by_hand.module, batches, space=Full(), reduce="contrast"
        )
        assert_close(fold.kernels["full"], expected)
        with torch.no_grad():
            values = torch.cat([by_hand.module(**batch).logits for batch in batches])
        centred = values - values.mean(dim=1, keepdim=True)
        assert_allclose(fold.f0, centred.numpy(), rtol=1e-9, atol=1e-12)
    assert max(c["full"]["relative_error"] for c in folds.checks) < 1e-9
    joined, f0 = (
        block_diagonal(folds.entries, "full"),
        outputs_out_of_fold(folds.entries),
    )
    for i in range(8):
        for j in range(8):
            same = [fold for fold in folds.entries if {i, j} <= set(fold.held)]
            entry = same[0].kernels["full"][i, j] if same else torch.zeros(1, 1)
            assert torch.equal(joined[i, j], entry.to(joined))
        (own,) = (fold for fold in folds.entries if i in fold.held)
        assert (f0[i] == own.f0[i]).all()


@pytest.mark.parametrize("options", [{"head": "random"}])
def test_a_head_that_has_seen_no_labels_needs_no_folds(folder, options):
    compared = Comparison.of(load(folder, **options), SPLIT, [Rows(2)])
    assert fold_kernels(compared, Resources()).entries == []


def test_a_label_with_fewer_examples_than_folds_is_refused(folder):
    compared = Comparison.of(load(folder), SPLIT, [Rows(2)])
    with pytest.raises(TaskError, match="has 4 training examples, fewer than folds=5"):
        fold_kernels(compared, Resources(), count=5)
    with pytest.raises(TaskError, match="folds=1; expected 2 folds or more"):
        fold_kernels(compared, Resources(), count=1)


def test_layers_are_measured_with_labels_out_of_fold(folder, tmp_path):
    rows = "\n".join(
        [
            "label,text",
            *(f"{('bad', 'good')[e.label]},{e.a}" for e in reviews(60).train),
        ]
    )
    (tmp_path / "own.csv").write_text(rows)
    protocol = Protocol(model=str(folder), data=tmp_path / "own.csv", test_size=4)
    (record,) = layer_records(protocol, Cell("own", 4, 13), ["rows:2"])
    split = LayerKernels.of(record)
    unseen = split.honest
    assert unseen is not split
    assert sorted(len(rows) for rows in unseen.folds) == [4, 4]
    first, second = unseen.folds
    for layer in unseen.layers.values():
        assert not layer.kernel[np.ix_(first, second)].any()
        assert layer.kernel[np.ix_(first, first)].any()
    # The fitted head knows the labels it was fitted to better than new ones.
    assert np.abs(split.residual).sum() < np.abs(unseen.residual).sum()


@pytest.mark.slow
def test_permuted_labels_give_chance_by_every_internal_score():
    """The real model: a head fitted to permuted labels knows most of them."""
    rng = np.random.default_rng(0)
    split = few_shot(load_task("reviews"), 32, 20, 0)
    labels = rng.permutation([example.label for example in split.train])
    permuted = replace(
        split,
        train=tuple(
            replace(example, label=int(label))
            for example, label in zip(split.train, labels, strict=True)
        ),
    )
    backbone = load_backbone(None, permuted)
    compared = Comparison.of(backbone, permuted, [Rows(3)], options=KernelOptions())
    computation = kernels(compared.work)
    error = 0.5 / len(labels) ** 0.5
    seen = evaluate(compared, computation).record
    honest = evaluate(
        compared, computation, folds=fold_kernels(compared, Resources())
    ).record
    leak = seen["spaces"][0]["classifiers"]["ridge"]["selection"]
    assert leak > 0.5 + 3 * error
    for entry in honest["spaces"]:
        for kind in ("ridge", "logistic", "svm"):
            chance = entry["classifiers"][kind]["selection"] - 0.5
            assert abs(chance) < 3 * error, (entry["label"], kind)
        a = entry["alignment"]
        assert abs(a["value"] - a["null_mean"]) < 3 * a["null_std"], entry["label"]
