"""Kernels before, during and after fine-tuning, all of the same coordinates."""

import copy
import json
import math
from dataclasses import asdict, replace

import numpy as np
import peft
import pytest
import torch
from cases import BY_NAME
from dense import assert_close, gradients, kernel
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from test_backbone import SENTIMENT, checkpoint, outputs, pooling, reviews
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from ntk import distance
from ntk.evolution import KernelTrack, Pinned, kernel_change, merged, pinned, velocity
from ntk.function import FunctionError
from ntk.kernel import empirical_ntk, gram_matrix
from ntk.spaces import Bias, Columns, Full, LoRA, Rows
from rocoft import RoCoFTConfig
from rocoft.architecture import SelectionError
from rocoft.backbone import load_backbone
from rocoft.methods import apply_method, parse_method
from rocoft.readouts import MeanPooled, Prompted
from rocoft.trainer import fine_tune

seeds = st.integers(0, 2**32 - 1)
QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 8}
METHODS = ("full", "rows:2", "columns:2", "rows:1+columns:1", "rows:2+bias", "lora:2")
METHODS += ("dora:2", "bitfit", "head", "probe", "masked rows:2")


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def features(k, seed, p=None):
    return np.random.default_rng(seed).standard_normal((k, p or k + 2))


def gram(k, seed):
    x = features(k, seed)
    return x @ x.T


def blocks(n, c, seed):
    """Return a kernel ``(n, n, c, c)`` and its Gram matrix, by loops."""
    J = features(n * c, seed)
    K, G = np.empty((n, n, c, c)), J @ J.T
    for i, j, a, b in np.ndindex(K.shape):
        K[i, j, a, b] = G[i * c + a, j * c + b]
    return K, G


def numbers(change):
    found = asdict(change)
    return found.pop("measures") | found


# The change of a kernel.


@given(st.integers(2, 5), st.integers(1, 3), seeds)
def test_change_matches_a_dumb_twin(n, c, seed):
    (before, A), (after, B) = blocks(n, c, seed), blocks(n, c, seed + 1)
    Y = features(n, seed + 2, c)
    found = kernel_change(before, after, targets=Y)
    norms = [math.sqrt(sum(x * x for x in K.flatten())) for K in (A, B)]
    product = sum(a * b for a, b in zip(A.flatten(), B.flatten(), strict=True))
    close(found.distance, 1 - product / norms[0] / norms[1])
    close(found.norm_ratio, norms[1] / norms[0])
    close(found.measures.frobenius, np.linalg.norm(B - A) / norms[0])
    assert found.rank == max(1, min(10, n * c - 1))
    assert asdict(found.measures) == pytest.approx(
        asdict(distance.summary(A, B, rank=found.rank)), nan_ok=True
    )
    y = np.array([Y[i, k] for i in range(n) for k in range(c)])
    for value, K, size in (
        (found.alignment_before, A, norms[0]),
        (found.alignment_after, B, norms[1]),
    ):
        close(value, y @ K @ y / (size * (y @ y)))


@given(st.integers(2, 5), st.integers(2, 3), seeds)
def test_change_of_gram_matrices_is_that_of_kernels(n, c, seed):
    (before, A), (after, B) = blocks(n, c, seed), blocks(n, c, seed + 1)
    Y = features(n, seed, c)
    kernels = torch.from_numpy(before), torch.from_numpy(after)
    found = kernel_change(*kernels, targets=torch.from_numpy(Y), rank=2)
    of_grams = kernel_change(A, B, targets=Y.reshape(-1), rank=2)
    assert numbers(found) == pytest.approx(numbers(of_grams), nan_ok=True)
    columns = features(n * c, seed, 3)
    shapes = [kernel_change(*pair, targets=columns) for pair in (kernels, (A, B))]
    assert numbers(shapes[0]) == pytest.approx(numbers(shapes[1]), nan_ok=True)
    assert kernel_change(A, B).alignment_before is None


@given(st.integers(4, 9), seeds, st.floats(0.01, 100))
def test_a_scaled_kernel_has_not_turned(k, seed, scale):
    A = gram(k, seed)
    found = kernel_change(A, scale * A, rank=2)
    close(found.distance, 0)
    close(found.norm_ratio, scale)
    close((found.measures.cka, found.measures.overlap), 1)
    close(found.measures.frobenius, abs(scale - 1), 1e-7)


def test_change_is_plain_numbers():
    found = kernel_change(gram(12, 0), gram(12, 1), targets=np.ones(12))
    assert found.rank == 10
    text = json.dumps(asdict(found), allow_nan=False)
    assert json.loads(text)["measures"]["cka"] == found.measures.cka


def test_alignment_shows_a_kernel_that_turns_to_its_targets():
    y = np.repeat([1.0, -1.0], 6)
    found = kernel_change(np.eye(12), np.eye(12) + np.outer(y, y), targets=y)
    close(found.alignment_before, 1 / math.sqrt(12))
    close(found.alignment_after, 13 / math.sqrt(11 + 13**2))


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        (np.eye(3), np.eye(4), {}, r"`other` has shape \(4, 4\); expected \(3, 3\)"),
        (np.ones(3), np.eye(3), {}, r"`before` has shape \(3,\); expected \(n, n, c"),
        (np.eye(3), np.ones((3, 3, 1)), {}, r"`after` has shape \(3, 3, 1\)"),
        (np.eye(3), np.eye(3), {"rank": 4}, "`rank=4`; expected 1..3"),
        (np.eye(3), np.eye(3), {"rank": 0}, "`rank=0`; expected 1..3"),
        (np.eye(3), np.eye(3), {"targets": np.ones(2)}, r"`targets` has shape \(2,\)"),
    ],
)
def test_misfits_are_refused(before, after, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_change(before, after, **options)


# Velocity.


@given(st.integers(2, 5), st.integers(1, 3), st.integers(2, 5), seeds)
def test_velocity_matches_a_dumb_twin(n, c, count, seed):
    generator = np.random.default_rng(seed)
    kernels, grams = zip(*(blocks(n, c, seed + i) for i in range(count)), strict=True)
    times = np.cumsum(generator.random(count) + 0.1)
    expected = []
    for i in range(count - 1):
        A, B = grams[i], grams[i + 1]
        cosine = (A * B).sum() / math.sqrt((A * A).sum() * (B * B).sum())
        expected.append((1 - cosine) / (times[i + 1] - times[i]))
    for some in (kernels, [torch.from_numpy(K) for K in kernels], grams):
        close(velocity(some, times), expected)


def test_velocity_of_a_rotation():
    angles = np.array([0.0, 0.1, 0.1, 0.4])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    kernels = [np.outer(v, v) for v in vectors]
    turned = np.sin(np.diff(angles)) ** 2
    close(velocity(kernels, [0, 1, 3, 3.5]), turned / [1, 2, 0.5])


@pytest.mark.parametrize(
    ("count", "times", "message"),
    [
        (1, [0], r"`times` has shape \(1,\) for 1 kernels; expected .* at least two"),
        (2, [0], r"`times` has shape \(1,\) for 2 kernels"),
        (3, [0, 2, 2], r"`times=\[0, 2, 2\]`; expected ascending ones"),
    ],
)
def test_times_that_do_not_fit_are_refused(count, times, message):
    with pytest.raises(ValueError, match=message):
        velocity([np.eye(2)] * count, times)


# Merging.


@pytest.fixture(scope="module")
def split():
    return replace(reviews(16, test=6), dev=reviews(24, test=0).train[16:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return checkpoint(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def backbone(folder, split):
    return load_backbone(folder, split, head="random", dtype=torch.float64)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory, split):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        place = checkpoint(tmp_path_factory.mktemp("pooled"))[0]
    pooling(place, pooling_mode_mean_tokens=True)
    return load_backbone(place, split, head="random", dtype=torch.float64)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        place = checkpoint(tmp_path_factory.mktemp("masked"), "BertForMaskedLM")[0]
    prompt = replace(SENTIMENT, template="{a} it was {mask}")
    return load_backbone(place, prompted_split(prompt), dtype=torch.float64)


def prompted_split(prompt):
    drawn = reviews(16, prompt=prompt, test=6)
    return replace(drawn, dev=drawn.train[:8])


def tune(backbone, split, method, **arguments):
    rate = 1e-2 if method in ("full", "masked rows:2", "rows:2+bias") else 5e-2
    return fine_tune(
        backbone, split, method, lrs=[rate], arguments={**QUICK, **arguments}
    )


def state(model):
    """Return all that merging must leave alone."""
    return (
        [(n, type(m), m.training) for n, m in model.named_modules()],
        [(n, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()],
        {n: b.clone() for n, b in model.named_buffers()},
    )


def assert_same_state(one, other):
    assert one[0] == other[0]
    for (name, flag, value), (also, as_well, and_so) in zip(
        one[1], other[1], strict=True
    ):
        assert (name, flag) == (also, as_well)
        assert torch.equal(value, and_so), name
    assert all(torch.equal(one[2][n], other[2][n]) for n in one[2])


def assert_plain(plain, start):
    """Assert that a model is made as one that no method was applied to."""
    assert [(n, type(m)) for n, m in plain.named_modules()] == [
        (n, type(m)) for n, m in start.named_modules()
    ]
    for (name, found), (also, expected) in zip(
        plain.named_parameters(), start.named_parameters(), strict=True
    ):
        assert (name, found.shape) == (also, expected.shape)
        assert found.requires_grad, name


def assert_merges(backbone, split, method):
    tuned = tune(backbone, split, method).model
    before = state(tuned)
    plain = merged(tuned)
    assert_same_state(state(tuned), before)
    assert_plain(plain, backbone.module)
    assert not plain.training
    found, expected = (
        outputs(replace(backbone, module=m), split.test) for m in (plain, tuned)
    )
    assert_close(found, expected, 1e-9)
    start = outputs(backbone, split.test)
    assert (found - start).abs().max() > 1e-3
    return plain


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_the_tuned_model(backbone, split, method):
    plain = assert_merges(backbone, split, method)
    (batch,), _ = backbone.encode(split.train[:6], 6)
    same, before, after = (
        empirical_ntk(m, batch)
        for m in (merged(backbone.module), backbone.module, plain)
    )
    assert torch.equal(same, before)
    assert kernel_change(before, same, rank=3).distance == 0
    assert kernel_change(before, after, rank=3).distance > 1e-6


@pytest.mark.parametrize("method", ["full", "rows:2", "lora:2", "bitfit"])
def test_readouts_keep_their_place(pooled, prompted, split, method):
    assert_merges(pooled, split, method)
    assert isinstance(pooled.module, MeanPooled)
    plain = assert_merges(prompted, prompted_split(prompted.prompt), method)
    assert isinstance(plain, Prompted)
    # The label words' rows are still those of the embedding.
    tied = plain.model.get_input_embeddings().weight
    assert plain.model.get_output_embeddings().weight is tied


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", ["rows:2", "auto:2", "lora:2", "dora:2"])
def test_merged_weights_have_the_kernel_of_weights_changed_by_hand(family, method):
    start, inputs = BY_NAME[family].build(), BY_NAME[family].inputs()
    tuned = apply_method(copy.deepcopy(start), parse_method(method), train_head=True)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    plain, by_hand = merged(tuned), copy.deepcopy(start)
    with torch.no_grad():
        for name, value in weights_by_hand(tuned.eval(), start).items():
            by_hand.get_parameter(name).copy_(value)
    expected = gradients(by_hand, inputs).values()
    assert_close(empirical_ntk(plain, inputs), kernel(list(expected)), 1e-9)


def weights_by_hand(tuned, start):
    """Return every weight of the plain model, read off what each layer does."""
    layers = {
        name.replace(".modules_to_save.default", ""): module
        for name, module in tuned.base_model.model.named_modules()
    }
    found = {}
    for path, module in start.named_modules():
        layer = layers[path]
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            kind = name.rpartition(".")[2]
            if kind == "weight" and hasattr(layer, "base_layer"):
                # A linear layer is its bias at zero, and its columns at the basis.
                d = layer.base_layer.weight.shape[int(isinstance(module, nn.Linear))]
                basis = torch.eye(d, dtype=parameter.dtype)
                columns = layer(basis) - layer(torch.zeros_like(basis))
                found[name] = columns.T if isinstance(module, nn.Linear) else columns
            else:
                found[name] = getattr(getattr(layer, "base_layer", layer), kind)
    return found


def test_two_adapters_merge_what_is_active():
    model = get_peft_model(BY_NAME["bert"].build(), RoCoFTConfig(r=2))
    model.add_adapter("second", RoCoFTConfig(r=2, selection="last"))
    for name, parameter in model.named_parameters():
        if ".rocoft_" in name:
            parameter.data.normal_()
    inputs = BY_NAME["bert"].inputs()
    found = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        with torch.no_grad():
            found[name] = merged(model)(**inputs).logits
            assert_close(found[name], model.eval()(**inputs).logits, 1e-9)
    assert (found["default"] - found["second"]).abs().max() > 1e-3


def test_training_mode_is_kept():
    model = apply_method(
        BY_NAME["bert"].build(), parse_method("rows:2"), train_head=True
    )
    assert all(module.training for module in merged(model.train()).modules())
    assert not any(module.training for module in merged(model.eval()).modules())


def test_wrappers_of_training_are_left_out():
    model = BY_NAME["bert"].build()
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        plain = merged(wrapped)
        assert_plain(plain, model)
        assert plain is not model


def test_mixed_precision_is_left_out(tmp_path):
    model, inputs = start().float(), inputs_of()
    trainer(model, tmp_path, max_steps=1, bf16=True).train()
    exact = start().float()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        rough = model.eval()(**inputs).logits
        assert torch.equal(
            merged(model)(**inputs).logits, exact.eval()(**inputs).logits
        )
        # The one that is trained goes on as before.
        assert torch.equal(model(**inputs).logits, rough)
        assert not torch.equal(rough, exact(**inputs).logits)


def test_what_cannot_be_merged_is_refused():
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = get_peft_model(BY_NAME["bert"].build(), config)
    with pytest.raises(
        FunctionError, match="adapter 'default' is of type .*PROMPT_TUNI"
    ):
        merged(model)
    model = BY_NAME["bert"].build()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)
    with pytest.raises(FunctionError, match="has 2 adapted layers, such as 'bert.enc"):
        merged(model)
    quantised = nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), False)
    with pytest.raises(FunctionError, match=r"'weight' is quantised \(torch.int8\)"):
        merged(quantised)


# Pinned spaces.


def shuffled(model):
    """Return a copy with other weights, so that other rows are the largest."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.copy_(
                parameter.flatten()[torch.randperm(parameter.numel())].view_as(
                    parameter
                )
            )
    return changed


def test_pinned_rows_stay_when_the_weights_change(bert):
    space = Rows(2, strategy="max") + Columns(1, strategy="min") + Bias()
    fixed, changed = pinned(space, bert), shuffled(bert)
    inputs = BY_NAME["bert"].inputs()
    assert torch.equal(*(empirical_ntk(bert, inputs, space=s) for s in (space, fixed)))
    rows, columns = (explicit(part, bert) for part in space.parts[:2])
    by_hand = Rows(indices=rows) + Columns(indices=columns) + Bias()
    found, expected, moved = (
        empirical_ntk(changed, inputs, space=s) for s in (fixed, by_hand, space)
    )
    assert_close(found, expected, 1e-12)
    assert (found - moved).abs().max() > 1e-3 * found.abs().max()


def explicit(space, model):
    """Return by weight what a space takes, by hand: the rows of the largest norm."""
    found = {}
    for name, parameter in model.named_parameters():
        inside = ".layer." in name and parameter.ndim == 2
        if inside and isinstance(space, Rows):
            order = parameter.norm(dim=1).argsort(descending=True)
        elif inside:
            order = parameter.norm(dim=0).argsort()
        if inside:
            found[name] = tuple(sorted(order[: space.count].tolist()))
    return found


def test_spaces_that_do_not_look_at_weights_are_pinned_as_they_are(bert):
    for space in (Full(), Rows(3), LoRA(2), Bias() + Columns(1, strategy="random")):
        assert pinned(space, bert) is space


def test_pinned_spaces_are_restricted_and_added_like_others(bert):
    space, inputs = Rows(2, strategy="max"), BY_NAME["bert"].inputs()
    fixed = pinned(space, bert)
    assert isinstance(fixed, Pinned)
    assert fixed.name == "rows:2/strategy=max"
    for made in (
        lambda s: s.at("query"),
        lambda s: s.layers(1),
        lambda s: s.at("value").layers(-1) + Bias(),
    ):
        found, expected = (
            empirical_ntk(bert, inputs, space=made(s)) for s in (fixed, space)
        )
        assert torch.equal(found, expected)
    with pytest.raises(SelectionError, match="matches none"):
        fixed.at("nowhere").maps(bert)


def test_pinned_spaces_are_refused_by_other_models(bert):
    fixed = pinned(Rows(2, strategy="max"), bert)
    with pytest.raises(
        SelectionError, match="was pinned on a model with 'bert.enc.*GPT2"
    ):
        empirical_ntk(BY_NAME["gpt2"].build(), BY_NAME["gpt2"].inputs(), space=fixed)


# Tracks.


SPACES = {"full": Full(), "rows": Rows(2, strategy="max")}


def examples(count=16, length=7):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, 60, (count, length), generator=generator)
    return [{"input_ids": t, "labels": int(t[0]) % 2} for t in tokens]


def trainer(model, place, *callbacks, **options):
    options = {"max_steps": 5, "learning_rate": 1e-2, **options}
    arguments = TrainingArguments(
        str(place),
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy=options.pop("save_strategy", "no"),
        **options,
    )
    return Trainer(
        model, arguments, train_dataset=examples(), callbacks=list(callbacks)
    )


def start(method="full"):
    """Return a model with dropout that trains by a method, in float64."""
    model = BY_NAME["bert"].build()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return apply_method(model, parse_method(method), train_head=True)


def inputs_of(count=4):
    return {"input_ids": torch.stack([e["input_ids"] for e in examples(count)])}


@pytest.mark.parametrize("method", ["full", "rows:2", "lora:2"])
def test_track_measures_the_model_that_is_trained(tmp_path, method):
    inputs, track = inputs_of(), KernelTrack(inputs_of(), SPACES, every=2)
    model = start(method)
    trainer(model, tmp_path, track).train()
    assert track.steps == [0, 2, 4, 5]
    close(track.epochs, [0, 0.5, 1, 1.25])
    base, plain = start(), merged(model)
    for name, own in SPACES.items():
        kernels, space = track.kernels[name], pinned(own, base)
        assert len(kernels) == 4
        for found, at in ((kernels[0], base), (kernels[-1], plain)):
            assert_close(found, empirical_ntk(at, inputs, space=space), 1e-9)
        assert kernels[0].shape == (4, 4, 2, 2)
        moved = velocity(kernels, track.steps)
        assert (moved > 1e-9).all()
    # Training took the same steps as without, dropout included.
    alone = start(method)
    trainer(alone, tmp_path).train()
    for (name, found), expected in zip(
        model.named_parameters(), alone.parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
        assert found.requires_grad == expected.requires_grad
    # And in between it measured what a shorter training ends with.
    short = start(method)
    trainer(short, tmp_path, max_steps=2).train()
    space = pinned(SPACES["rows"], base)
    expected = empirical_ntk(merged(short), inputs, space=space)
    assert_close(track.kernels["rows"][1], expected, 1e-9)


def test_track_at_given_steps_with_the_options_of_kernels(tmp_path):
    options = {"reduce": "trace", "kind": "signgd", "batch_size": 3}
    read = lambda output: 3 * output.logits[:, :1]
    track = KernelTrack(inputs_of(), SPACES, at=(1, 3, 99), outputs=read, **options)
    model = start()
    trainer(model, tmp_path, track, max_steps=3).train()
    assert track.steps == [1, 3]
    found = track.kernels["full"][-1]
    expected = empirical_ntk(model, inputs_of(), outputs=read, **options)
    assert found.shape == (4, 4)
    assert_close(found, expected, 1e-12)


def test_a_new_training_starts_the_track_anew(tmp_path):
    track = KernelTrack(inputs_of(), SPACES, at=(0, 1))
    for seed in (0, 1):
        model = BY_NAME["bert"].build(seed)
        before = empirical_ntk(model, inputs_of(), space=SPACES)
        trainer(model, tmp_path, track, max_steps=1).train()
        assert track.steps == [0, 1]
        for name, expected in before.items():
            assert_close(track.kernels[name][0], expected, 1e-12)
        assert [len(kernels) for kernels in track.kernels.values()] == [2, 2]


def test_a_resumed_training_continues_the_track(tmp_path):
    whole, parts = (KernelTrack(inputs_of(), SPACES, every=2) for _ in range(2))
    trainer(start(), tmp_path / "whole", whole, max_steps=6).train()
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(start(), tmp_path, parts, max_steps=4, **options).train()
    assert parts.steps == [0, 2, 4]
    checkpoint = str(tmp_path / "checkpoint-3")
    again = trainer(start(), tmp_path, parts, max_steps=6, **options)
    again.train(resume_from_checkpoint=checkpoint)
    assert parts.steps == whole.steps == [0, 2, 4, 6]
    assert parts.epochs == whole.epochs
    for name, kernels in whole.kernels.items():
        for found, expected in zip(parts.kernels[name], kernels, strict=True):
            assert_close(found, expected, 1e-9)


def test_track_measures_in_full_precision(tmp_path):
    model = start().float()
    expected = empirical_ntk(model, inputs_of())
    track = KernelTrack(inputs_of(), {"full": Full()}, at=(0, 2))
    trainer(model, tmp_path, track, max_steps=2, bf16=True).train()
    exact = start().float()
    exact.load_state_dict(model.state_dict())
    assert torch.equal(track.kernels["full"][0], expected)
    after = empirical_ntk(exact, inputs_of())
    assert torch.equal(track.kernels["full"][1], after)
    assert not torch.equal(after, expected)


def test_one_step_moves_the_kernel_as_far_as_by_hand(tmp_path):
    """A step of gradient descent on one example, without dropout."""
    model = start()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    by_hand, rate = copy.deepcopy(model), 0.05
    (example,) = examples(1)
    batch = {"input_ids": example["input_ids"][None]}
    optimizer = SGD(model.parameters(), lr=rate)
    track = KernelTrack(inputs_of(), {"full": Full()}, at=(0, 1))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, max_grad_norm=0, report_to="none", use_cpu=True
    )
    Trainer(
        model,
        arguments,
        train_dataset=[example],
        callbacks=[track],
        optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
    ).train()
    labels = torch.tensor([example["labels"]])
    by_hand(**batch, labels=labels).loss.backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter.sub_(rate * parameter.grad)
    kernels = [
        gram_matrix(kernel(list(gradients(m, inputs_of()).values()))).numpy()
        for m in (start(), by_hand)
    ]
    cosine = (kernels[0] * kernels[1]).sum() / np.prod(
        [np.linalg.norm(K) for K in kernels]
    )
    close(velocity(track.kernels["full"], track.steps), 1 - cosine, 1e-8)
    assert 1e-6 < 1 - cosine < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`every=None, at=None`; expected one of them"),
        ({"every": 1, "at": [1]}, r"`every=1, at=\[1\]`; expected one of them"),
        ({"every": 0}, "`every=0`; expected a number of steps, 1 or more"),
        ({"at": []}, r"`at=\[\]`; expected numbers of steps, 0 or more"),
        ({"at": [3, -1]}, r"`at=\[3, -1\]`; expected numbers of steps"),
    ],
)
def test_steps_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KernelTrack(inputs_of(), SPACES, **options)
