"""RoCoFT adapters on disk: every route back, LoRA export, and files that are broken."""

import json
import subprocess
import sys
import warnings
from itertools import cycle
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from cases import BY_NAME, GPT2, SHORT, classifier, of
from covering import pairs
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file

import rocoft
from rocoft import RoCoFTConfig, SelectionError, export_lora

ROOT = Path(__file__).parents[3]
AXES = ("row", "column", "both", "auto")


def classifier_model(kind="Bert"):
    torch.manual_seed(3)
    text = GPT2 if kind == "GPT2" else SHORT
    return classifier(kind, text)().eval()


def tokens():
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(4, 60, (3, 7), generator=generator)}


def perturb(model):
    """Give everything that trains other numbers, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def trained(base, **options):
    options = {"task_type": "SEQ_CLS", "selection": "random"} | options
    return perturb(get_peft_model(base, RoCoFTConfig(r=2, **options)))


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or tokens())).logits


def by_peft_model(base, folder):
    return PeftModel.from_pretrained(base, folder)


def by_low_memory(base, folder):
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())
    return model


def by_auto_class(base, folder):
    base_folder = Path(folder).parent / "base"
    base.save_pretrained(base_folder)
    file = Path(folder) / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(base_folder)}))
    return peft.AutoPeftModelForSequenceClassification.from_pretrained(folder)


def injectable(folder):
    # peft looks modules_to_save up under the names of the model that it is given.
    weights = load_peft_weights(folder, device="cpu")
    return {k.removeprefix("base_model.model."): v for k, v in weights.items()}


def by_injection(base, folder):
    config = peft.PeftConfig.from_pretrained(folder)
    model = inject_adapter_in_model(config, base)
    weights = injectable(folder)
    result = set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys
    return model


def by_injection_of_meta(base, folder):
    config = peft.PeftConfig.from_pretrained(folder)
    model = inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
    weights = injectable(folder)
    set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
    return model


def by_transformers(base, folder):
    base.load_adapter(folder)
    return base


ROUTES = [
    by_peft_model,
    by_low_memory,
    by_auto_class,
    by_injection,
    by_injection_of_meta,
    by_transformers,
]


# Every route by both kinds of layer, which meet every axis on the way.
CASES = [
    *zip(ROUTES, cycle(AXES), cycle(["Bert"]), strict=False),
    *zip(ROUTES, cycle(AXES[2:] + AXES[:2]), cycle(["GPT2"]), strict=False),
]


@pytest.mark.parametrize(("route", "axis", "kind"), CASES)
def test_outputs_are_bit_equal_after_loading(kind, axis, route, tmp_path):
    model = trained(classifier_model(kind), axis=axis, bias="rocoft_only")
    expected = logits(model)
    assert not torch.equal(expected, logits(classifier_model(kind)))
    model.save_pretrained(tmp_path / "adapter")
    if kind == "GPT2":
        base = classifier_model(kind)
        assert base.config.pad_token_id == model.config.pad_token_id
    loaded = route(classifier_model(kind), str(tmp_path / "adapter")).eval()
    # Some routes leave weights where the file lies in memory, and on some processors
    # the last bits of a product depend on the address of what is multiplied.
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("route", ROUTES)
def test_stored_indices_outrank_those_that_would_be_selected(route, tmp_path):
    model = trained(classifier_model(), selection="max", axis="both")
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = classifier_model()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "encoder" in name and parameter.ndim == 2:
                # Other norms: the strategy would select other rows and columns.
                parameter.mul_(1 + torch.rand(len(parameter), 1))
                parameter.mul_(1 + 3 * torch.rand(parameter.shape[1]))
    chosen = {
        name: dict(module.tensors("default"))
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, rocoft.adapter.layer.RoCoFTLinear)
    }
    fresh = get_peft_model(base, RoCoFTConfig(r=2, selection="max", axis="both"))
    modules = dict(fresh.base_model.model.named_modules())
    differ = [
        not torch.equal(modules[n].tensors("default")[k], kept[k])
        for n, kept in chosen.items()
        for k in kept
        if k.endswith("_indices")
    ]
    assert any(differ)
    loaded = route(fresh.unload(), str(tmp_path / "adapter"))
    modules = dict(loaded.named_modules())
    prefix = "base_model.model." if isinstance(loaded, PeftModel) else ""
    for name, kept in chosen.items():
        for key, value in (
            modules[f"{prefix}{name}"]
            .tensors(
                loaded.active_adapters[0]
                if isinstance(loaded, PeftModel)
                else "default"
            )
            .items()
        ):
            assert torch.equal(value, kept[key])
    assert expected.shape == logits(loaded).shape


def test_adapter_file_holds_what_trains_and_little_else(tmp_path):
    model = trained(classifier_model(), task_type=None)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    values = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    indices = sum(t.numel() for t in tensors.values() if not t.is_floating_point())
    assert values == model.get_nb_trainable_parameters()[0]
    # Two blocks of six weights, two rows of each.
    assert indices == 2 * 6 * 2
    assert all(t.dtype in {torch.float32, torch.int64} for t in tensors.values())


def test_configuration_survives_the_disk(tmp_path):
    config = RoCoFTConfig(
        r=2,
        axis={"query": "column", ".*": "row"},
        selection="random",
        seed=5,
        rank_pattern={"key": 3},
        layers_to_transform=[1],
    )
    model = get_peft_model(classifier_model(), config)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, RoCoFTConfig)
    first, second = config.to_dict(), loaded.to_dict()
    assert second.pop("inference_mode")
    first.pop("inference_mode")
    # The type of task was found by peft, which writes it beside the configuration.
    for one in (first, second):
        one.pop("auto_mapping")
    assert first == second


def test_model_card_says_that_the_import_is_needed(tmp_path):
    model = trained(classifier_model())
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import rocoft") == 1
    assert "library_name: peft" in card


@pytest.mark.slow
def test_process_without_the_import_finds_the_card_and_a_key_error(tmp_path):
    trained(classifier_model()).save_pretrained(tmp_path)
    code = (
        "import sys, peft\n"
        "try: peft.PeftConfig.from_pretrained(sys.argv[1])\n"
        "except KeyError as error: print(error)\n"
        "assert 'rocoft' not in sys.modules"
    )
    done = run(code, tmp_path)
    assert done.stdout.strip() == "'ROCOFT'", done.stderr


def run(code, *arguments):
    """Run code in a process of its own, away from the repository."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("kind", "axis", "bias"),
    pairs(["Bert", "GPT2"], AXES, ["none", "all", "rocoft_only"]),
)
def test_exported_lora_is_exact(kind, axis, bias, tmp_path):
    base = classifier_model(kind)
    model = trained(base, axis=axis, bias=bias, rank_pattern=uneven(kind))
    expected = logits(model)
    written = export_lora(model, tmp_path)
    ranks = {written.r, *written.rank_pattern.values()}
    assert len(ranks) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(classifier_model(kind), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-6, atol=1e-6)
    # One factor is one-hot, so merging adds the very same numbers.
    merged = loaded.merge_and_unload().state_dict()
    own = model.merge_and_unload().state_dict()
    assert own.keys() == merged.keys()
    for name, value in own.items():
        assert torch.equal(merged[name], value), name


def uneven(kind):
    return {"query": 3} if kind == "Bert" else {"c_fc": 3}


@pytest.mark.slow
def test_exported_lora_loads_in_a_process_without_us(tmp_path):
    model = trained(classifier_model(), axis="both", bias="all")
    expected = logits(model)
    classifier_model().save_pretrained(tmp_path / "base")
    export_lora(model, tmp_path / "lora")
    save_file(tokens() | {"expected": expected}, tmp_path / "inputs.safetensors")
    code = """if True:
        import sys, torch, transformers
        from pathlib import Path
        from peft import PeftModel
        from safetensors.torch import load_file
        folder = Path(sys.argv[1])
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder / "base"
        )
        model = PeftModel.from_pretrained(base, folder / "lora").eval()
        inputs = load_file(folder / "inputs.safetensors")
        expected = inputs.pop("expected")
        with torch.no_grad():
            print((model(**inputs).logits - expected).abs().max().item())
        assert not any(name.startswith("rocoft") for name in sys.modules)
    """
    assert float(run(code, tmp_path).stdout) <= 1e-6


def test_export_of_an_injected_adapter(tmp_path):
    base = classifier_model()
    base.add_adapter(RoCoFTConfig(r=2, axis="both"), "mine")
    perturb(base)
    export_lora(base, tmp_path, adapter_name="mine")
    loaded = PeftModel.from_pretrained(classifier_model(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(base), rtol=1e-6, atol=1e-6)


def test_export_needs_an_adapter_of_ours(tmp_path):
    with pytest.raises(SelectionError, match=r"adapter_name='default' is no RoCoFT"):
        export_lora(classifier_model(), tmp_path)
    model = trained(classifier_model())
    with pytest.raises(SelectionError, match=r"'other'.*\['default'\]"):
        export_lora(model, tmp_path, adapter_name="other")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path):
    """Return a folder with an adapter."""
    trained(classifier_model(), task_type=None, axis="both").save_pretrained(tmp_path)
    return tmp_path


def state(model):
    """Return all that a failed load may not change."""
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    types = [type(m) for m in model.modules()]
    return flags, types, hasattr(model, "peft_config"), logits(model)


def same(first, second):
    return first[:3] == second[:3] and torch.equal(first[3], second[3])


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_broken_file_is_refused_and_nothing_changes(saved, damage):
    file = saved / "adapter_model.safetensors"
    whole = file.read_bytes()
    broken = {"cut": whole[: len(whole) // 2], "garbage": b"x" * 100, "empty": b""}
    file.write_bytes(broken[damage])
    base = classifier_model()
    before = state(base)
    with pytest.raises(SelectionError, match="corrupt or was cut short"):
        PeftModel.from_pretrained(base, saved)
    assert same(before, state(base))


def test_file_without_indices_is_refused_and_nothing_changes(saved):
    def change(tensors):
        for name in [n for n in tensors if n.endswith("_row_indices")]:
            del tensors[name]

    rewrite(saved, change)
    base = classifier_model()
    before = state(base)
    with pytest.raises(SelectionError, match="lacks 12 tensors.*row_indices"):
        PeftModel.from_pretrained(base, saved)
    assert same(before, state(base))


@pytest.mark.parametrize("low_memory", [False, True])
def test_indices_out_of_range_are_refused(saved, low_memory):
    def change(tensors):
        name = next(n for n in tensors if n.endswith("query.rocoft_row_indices"))
        tensors[name] = torch.tensor([3, 16])

    rewrite(saved, change)
    with pytest.raises(SelectionError, match=r"\[3, 16\].*no ascending numbers below"):
        PeftModel.from_pretrained(
            classifier_model(), saved, low_cpu_mem_usage=low_memory
        )


def other_sizes(**sizes):
    config = tf.BertConfig(
        **{
            "vocab_size": 60,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        }
        | sizes
    )
    return tf.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 32}, "has shape"),
        ({"num_hidden_layers": 1}, "does not fit"),
        ({"intermediate_size": 20}, "has shape"),
    ],
)
def test_adapter_of_another_model_is_refused_and_nothing_changes(saved, sizes, message):
    base = other_sizes(**sizes)
    before = state(base)
    with pytest.raises(SelectionError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert same(before, state(base))
    # By hand, what was injected stays as it was.
    config = RoCoFTConfig(r=2, axis="both", selection="random")
    model = get_peft_model(base, config)
    before = state(model)
    with pytest.raises(SelectionError, match=message):
        set_peft_model_state_dict(model, load_peft_weights(str(saved), device="cpu"))
    assert same(before, state(model))


def test_second_adapter_that_does_not_fit_leaves_the_first(saved):
    model = trained(other_sizes(hidden_size=32), task_type=None)
    before = state(model)
    with pytest.raises(SelectionError, match="has shape"):
        model.load_adapter(saved, "second")
    assert same(before, state(model))
    assert list(model.peft_config) == ["default"]


def test_named_adapters_are_saved_with_their_cards(tmp_path):
    model = trained(classifier_model(), task_type=None)
    model.add_adapter("second", RoCoFTConfig(r=1, axis="column"))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert "import rocoft" in (folder / "README.md").read_text()
    model.set_adapter("second")
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = classifier_model()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    loaded.load_adapter(tmp_path / "second", "other")
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), expected)


def test_sequence_to_sequence_and_language_models_reload(tmp_path):
    for i, name in enumerate(("t5-generation", "llama-lm", "bloom", "deberta-v2")):
        family = BY_NAME[name]
        model = family.build()
        model = perturb(get_peft_model(model, RoCoFTConfig(r=2, axis="both")))
        read = family.outputs or (lambda output: output.logits)
        expected = read(model(**family.inputs()))
        model.save_pretrained(tmp_path / str(i))
        loaded = PeftModel.from_pretrained(family.build(), tmp_path / str(i)).eval()
        assert torch.equal(read(loaded(**family.inputs())), expected)


def test_language_model_head_in_modules_to_save(tmp_path):
    def base():
        torch.manual_seed(3)
        return of("Llama", "ForCausalLM", SHORT)().eval()

    config = RoCoFTConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = perturb(get_peft_model(base(), config))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(base()))
