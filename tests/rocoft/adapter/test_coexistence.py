"""Models that hold adapters already: nothing of theirs changes by accident."""

import shutil

import peft
import pytest
import torch
from adapted import adapted, bert, layers, named
from cases import BY_NAME
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from rocoft import RoCoFTConfig
from rocoft.models.architecture import SelectionError

INPUTS = BY_NAME["bert"].inputs()
WEIGHTS = "adapter_model.safetensors"


def state(model):
    """Return all that a refused adapter may not change."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configs = getattr(base, "peft_config", None)
    return {
        "types": [type(m) for m in base.modules()],
        "values": {n: v.clone() for n, v in base.state_dict().items()},
        "flags": {n: p.requires_grad for n, p in base.named_parameters()},
        "active": [layer.active_adapters for layer in layers(base).values()],
        "configs": None if configs is None else dict(configs),
        "outputs": model(**INPUTS).logits.detach(),
    }


def assert_same(model, before):
    after = state(model)
    for key in ("types", "flags", "active", "configs"):
        assert after[key] == before[key], key
    assert after["values"].keys() == before["values"].keys()
    for name, value in before["values"].items():
        assert torch.equal(after["values"][name], value), name
    assert torch.equal(after["outputs"], before["outputs"])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    adapted(bert(), axis="both", modules_to_save=["classifier"]).save_pretrained(folder)
    return folder


def changed(good, tmp_path, fault):
    """Return a copy of an adapter with a fault."""
    folder = tmp_path / fault
    shutil.copytree(good, folder)
    file = folder / WEIGHTS
    if fault == "absent":
        file.unlink()
    elif fault == "cut":
        file.write_bytes(file.read_bytes()[:500])
    else:
        tensors = load_file(file)
        name = next(n for n in tensors if n.endswith("query.rocoft_rows"))
        if fault == "shape":
            tensors[name] = tensors[name][:, :7].contiguous()
        elif fault == "lacks":
            del tensors[name]
        else:
            tensors[name.replace("rows", "row_indices")] = torch.tensor([3, 16])
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


FAULTS = ["shape", "lacks", "indices", "absent", "cut"]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_second_load_leaves_the_first(good, tmp_path, fault, trainable):
    folder = changed(good, tmp_path, fault)
    base = bert()
    model = PeftModel.from_pretrained(base, good, is_trainable=trainable)
    before = state(model)
    with pytest.raises(SelectionError):
        model.load_adapter(folder, "second", is_trainable=trainable)
    assert_same(model, before)
    with pytest.raises(SelectionError):
        PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    assert_same(model, before)
    with pytest.raises(SelectionError):
        PeftModel.from_pretrained(base, folder, "third", is_trainable=trainable)
    assert_same(model, before)
    # What follows works as if nothing had been tried.
    model.load_adapter(good, "second")
    model.set_adapter("second")
    assert torch.equal(model(**INPUTS).logits, before["outputs"])


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_first_load_leaves_the_plain_model(good, tmp_path, fault, trainable):
    folder = changed(good, tmp_path, fault)
    base = bert()
    before = state(base)
    with pytest.raises(SelectionError):
        PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    assert_same(base, before)


def test_an_adapter_in_training_survives_a_refused_load_of_its_name(good, tmp_path):
    config = RoCoFTConfig.from_pretrained(good)
    config.inference_mode = False
    model = get_peft_model(bert(), config)
    with torch.no_grad():
        for parameter in named(model, ".rocoft_").values():
            parameter.normal_()
    before = state(model)
    with pytest.raises(SelectionError, match="does not fit"):
        model.load_adapter(changed(good, tmp_path, "shape"), "default")
    assert_same(model, before)


@pytest.mark.parametrize(
    "second",
    [
        RoCoFTConfig(r=2, axis="column"),
        RoCoFTConfig(r=3),
        RoCoFTConfig(r=2, target_modules=["pooler.dense"], modules_to_save=["query"]),
        RoCoFTConfig(r=2, target_modules=["nothing"]),
    ],
)
def test_wrapping_again_is_refused_and_leaves_the_first(second):
    base = bert()
    model = get_peft_model(base, RoCoFTConfig(r=2, modules_to_save=["classifier"]))
    before = state(model)
    with pytest.raises(ValueError, match="holds an adapter 'default'|not found"):
        get_peft_model(base, second)
    assert_same(model, before)
    # The way out of the message.
    again = get_peft_model(model.unload(), RoCoFTConfig(r=2, axis="column"))
    trained = [n for n, p in again.named_parameters() if p.requires_grad]
    assert trained
    assert all(".rocoft_columns." in name for name in trained)


@pytest.mark.parametrize("heads", [None, ["classifier"]])
@pytest.mark.parametrize("second", [["query"], ["value"]])
def test_of_two_adapters_only_the_new_one_trains_and_counts(second, heads):
    base = bert()
    first = RoCoFTConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    get_peft_model(base, first)
    with torch.no_grad():
        for parameter in named(base, ".rocoft_").values():
            parameter.normal_()
    config = RoCoFTConfig(
        r=2, axis="column", target_modules=second, modules_to_save=heads
    )
    model = get_peft_model(base, config, adapter_name="second").eval()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".second" in name for name in trained)
    assert any("classifier" in name for name in trained) == bool(heads)
    assert torch.equal(model(**INPUTS).logits, bert()(**INPUTS).logits)


def test_adapters_of_another_method_are_refused_wherever_they_are():
    model = get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    base = model.get_base_model()
    before = state(base)
    config = RoCoFTConfig(target_modules=["value"])
    with pytest.raises(SelectionError, match="adapter 'default' already"):
        get_peft_model(base, config)
    with pytest.raises(SelectionError, match="adapters of another peft method"):
        get_peft_model(base, config, adapter_name="second")
    assert_same(base, before)
