"""Kernels of models whose linear layers keep their weights in the host's memory."""

import copy
import json

import pytest
import torch
from cases import BY_NAME, label_words_at_mask
from checkpoints import STORIES, needs_stories
from commands import exit_code
from dense import assert_close
from parts import as_planned, plan_of
from torch import nn

from ntk import compare
from ntk.gradients.capture import backward, record
from ntk.gradients.function import NetworkFunction
from ntk.kernels.empirical import compute, empirical_ntk
from ntk.scale.cache import content_key
from ntk.scale.work import Work
from ntk.spaces.kinds import Columns, Full, LoRA, Rows
from rocoft import keep_on_host, load_backbone
from rocoft.data.splits import few_shot
from rocoft.data.tasks import load_task
from rocoft.models.offloaded import OffloadedLinear
from rocoft.models.pretrained import BackboneError

SPACES = {
    "full": Full(),
    "rows": Rows(3),
    "large": Rows(2, strategy="max") + Columns(2, strategy="max"),
    "lora": LoRA(2),
}


def brought(model):
    return [m for m in model.modules() if isinstance(m, OffloadedLinear)]


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "gpt-neox", "llama", "qwen3", "gemma", "t5", "bart"]
)
def test_kernels_are_those_of_the_model_itself(family):
    model, inputs = BY_NAME[family].build(), BY_NAME[family].inputs(4)
    expected = compute(model, inputs, spaces=SPACES)
    linear = sum(type(m) is nn.Linear for m in model.modules())
    moved = keep_on_host(copy.deepcopy(model), "cpu")
    assert len(brought(moved)) == linear > 4
    found = compute(moved, inputs, spaces=SPACES)
    assert found.sizes == expected.sizes
    assert found.services == expected.services
    for name in SPACES:
        assert_close(found.kernels[name], expected.kernels[name], 1e-12, of=name)


@pytest.mark.parametrize("implementation", ["jacobian", "jvp"])
def test_the_definition_agrees(implementation):
    model, inputs = BY_NAME["bert"].build(), BY_NAME["bert"].inputs(2)
    moved = keep_on_host(copy.deepcopy(model), "cpu")
    found = empirical_ntk(moved, inputs, implementation=implementation)
    assert_close(found, empirical_ntk(model, inputs))


def test_no_weight_stays_between_forward_and_backward():
    model, inputs = (
        keep_on_host(BY_NAME["bert"].build(), "cpu"),
        BY_NAME["bert"].inputs(2),
    )
    hosts = {layer._host.data_ptr() for layer in brought(model)}
    counts = dict.fromkeys(hosts, 0)
    kept = set()

    def note(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    def counted(layer):
        counts[layer._host.data_ptr()] += 1
        # As from another device: a copy that lives as long as it is used.
        return layer._host.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OffloadedLinear, "base_values", counted)
        function = NetworkFunction(model)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            outputs, recorder = record(function, inputs, function.parameters)
        assert set(counts.values()) == {1}
        backward(outputs, recorder, lambda use, k, factor: None)
    # Each output's pass brings every weight again but those that nothing lies below.
    again = sorted(count - 1 for count in counts.values())
    assert again[-1] == outputs.shape[1]
    assert sum(count > 0 for count in again) >= len(hosts) - 3
    sizes = {layer._host.numel() for layer in brought(model)}
    assert sizes
    assert not kept & hosts


def test_shared_weights_and_chosen_modules_are_moved_whole():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(4, 4), nn.Linear(4, 2))
    moved = keep_on_host(model, "cpu", but=[model[3]])
    assert [type(m) for m in moved] == [nn.Linear] * 2 + [OffloadedLinear, nn.Linear]
    assert moved[0].weight is moved[1].weight


def test_a_plan_and_the_cache_know_the_weights():
    model, inputs = BY_NAME["bert"].build(), [BY_NAME["bert"].inputs(2)]
    moved = keep_on_host(copy.deepcopy(model), "cpu")
    how = plan_of(moved, inputs, 1, spaces=SPACES)
    found = as_planned(moved, inputs, how, spaces=SPACES)
    expected = compute(model, inputs, spaces=SPACES)
    assert_close(found.kernels["full"], expected.kernels["full"], 1e-12)
    key = lambda m: content_key(Work(m, inputs, 1, {"full": Full()}))
    other = keep_on_host(copy.deepcopy(model), "cpu")
    assert key(moved) == key(other)
    brought(other)[0]._host[0, 0] += 1
    assert key(moved) != key(other)


def test_label_words_are_read_from_an_offloaded_language_model():
    model, inputs = BY_NAME["bert-mlm"].build(), BY_NAME["bert-mlm"].inputs(3)
    expected = empirical_ntk(model, inputs, outputs=label_words_at_mask)
    moved = keep_on_host(
        copy.deepcopy(model), "cpu", but=[model.get_output_embeddings()]
    )
    assert brought(moved)
    assert_close(empirical_ntk(moved, inputs, outputs=label_words_at_mask), expected)


CAUSAL = ("--model", STORIES, "--template", "{a} She was {mask}", "--label-words")


@pytest.mark.parametrize(
    "model",
    [
        pytest.param((), id="embedded", marks=pytest.mark.slow),
        pytest.param(
            (*CAUSAL, "big", "happy", "--max-length", 32),
            marks=[needs_stories, pytest.mark.slow],
            id="causal",
        ),
    ],
)
def test_the_command_offloads_and_says_so(model, tmp_path):
    options = ["--shots", 2, "--test-size", 4, "--rows", 1, "--quiet", "--no-cache"]
    reports = []
    for name, more in (("whole", []), ("part", ["--offload"])):
        arguments = [*model, *options, *more, "--output", tmp_path, "--name", name]
        assert exit_code(compare.main, *arguments) == 0
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    whole, part = reports
    assert "in the host's memory" in " ".join(part["model"]["notes"])
    for one, other in zip(whole["spaces"], part["spaces"], strict=True):
        assert one["trace_by_layer"] == pytest.approx(other["trace_by_layer"], rel=1e-5)
        assert one["parameters"] == other["parameters"]


def test_quantised_weights_are_not_offloaded_as_well(capsys, tmp_path):
    arguments = ["--offload", "--load-in", "4bit", "--output", tmp_path]
    assert exit_code(compare.main, *arguments) == 2
    assert "Choose one of them" in capsys.readouterr().err
    split = few_shot(load_task("reviews"), 2, seed=0, test_size=4)
    with pytest.raises(BackboneError, match="Choose one"):
        load_backbone(None, split, load_in="4bit", offload=True)
