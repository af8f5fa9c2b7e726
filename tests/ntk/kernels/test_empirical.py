"""Invariances of kernels, kinds and reductions, and errors."""

import dense
import pytest
import torch
from cases import BY_NAME, Lambda
from covering import pairs
from dense import assert_close
from torch import nn
from transformers import BatchEncoding

from ntk.gradients.contrasts import ContrastReadout
from ntk.gradients.function import batch_length
from ntk.kernels import engine
from ntk.kernels.empirical import compute, empirical_ntk
from ntk.kernels.options import KernelOptions
from ntk.measures.gram import contrasts, gram_matrix, reduced
from ntk.spaces.kinds import Columns, Full, LoRA, Rows

BUILT = ["bert", "deberta-v2", "t5", "gpt2", "llama", "mixture"]
SPACES = {
    "full": Full(),
    "rows": Rows(2),
    "rows+columns": Rows(1, strategy="random") + Columns(2),
    "lora": LoRA(2),
}


def built(name, n=3):
    family = BY_NAME[name]
    return family.build(), family.inputs(n)


def kernels(model, inputs, other=None, **options):
    return compute(
        model, inputs, other, spaces=SPACES, options=KernelOptions(**options)
    ).kernels


def take(inputs, index):
    if isinstance(inputs, torch.Tensor):
        return inputs[index]
    return {key: value[index] for key, value in inputs.items()}


def assert_all_close(found, expected, index=...):
    for name in SPACES:
        assert_close(found[name], expected[name][index], of=name)


@pytest.mark.parametrize("kind", ["signgd", "asymmetric_signgd"])
@pytest.mark.parametrize(
    ("name", "spaces"),
    [
        ("mlp", {"full": Full(), "rows": Rows(2), "sum": Rows(1) + Columns(2)}),
        ("mlp", {"some": Rows(3), "others": Rows(2, strategy="last")}),
        ("bert", {"rows": Rows(2).at("output"), "lora": LoRA(2).at("output")}),
        ("gpt2", {"rows": Rows(2).at("mlp"), "embeddings": Full().at("wte")}),
        ("twice", {"full": Full(), "columns": Columns(2)}),
    ],
)
def test_sign_kernels_agree_with_the_definition(name, spaces, kind):
    model, inputs = built(name)
    found = compute(model, inputs, spaces=spaces, options=KernelOptions(kind=kind))
    expected = compute(
        model,
        inputs,
        spaces=spaces,
        options=KernelOptions(kind=kind, implementation="jacobian"),
    )
    for space in spaces:
        assert_close(found.kernels[space], expected.kernels[space], of=space)


@pytest.mark.parametrize("implementation", ["factors", "jacobian", "jvp"])
def test_sign_is_taken_of_the_right_gradient(implementation):
    """<g, sign g'> is not symmetric, and K[i, j] has the sign of j's gradient."""
    model, inputs = built("mlp")
    gradients = list(dense.gradients(model, inputs).values())
    expected = dense.kernel(gradients, right_of=torch.sign)
    assert not torch.allclose(expected, expected.permute(1, 0, 3, 2))
    found = empirical_ntk(
        model, inputs, kind="asymmetric_signgd", implementation=implementation
    )
    assert_close(found, expected)


@pytest.mark.parametrize("implementation", ["factors", "jacobian"])
def test_sign_kernel_agrees_with_plain_autograd(implementation):
    model, inputs = built("mlp")
    gradients = list(dense.gradients(model, inputs).values())
    expected = dense.kernel(gradients, left_of=torch.sign, right_of=torch.sign)
    found = empirical_ntk(model, inputs, kind="signgd", implementation=implementation)
    assert_close(found, expected)


@pytest.mark.parametrize("implementation", ["factors", "jacobian", "jvp"])
@pytest.mark.parametrize("kind", ["sgd", "asymmetric_signgd"])
@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_trace_is_that_of_the_full_kernel(name, kind, implementation):
    model, inputs = built(name)
    options = {"kind": kind, "implementation": implementation, "space": Rows(2)}
    full = empirical_ntk(model, inputs, **options)
    trace = empirical_ntk(model, inputs, reduce="trace", **options)
    assert_close(trace, torch.einsum("nmcc->nm", full))
    assert_close(reduced(full, "trace"), trace)


@pytest.mark.parametrize("implementation", ["factors", "jacobian", "jvp"])
@pytest.mark.parametrize("name", ["mlp", "bert-mlm"])
def test_margin_is_that_of_the_full_kernel(name, implementation):
    model, inputs = built(name)
    options = {"outputs": BY_NAME[name].outputs, "implementation": implementation}
    full = empirical_ntk(model, inputs, space=Rows(2), **options)
    margin = empirical_ntk(model, inputs, space=Rows(2), reduce="margin", **options)
    by_hand = full[..., 1, 1] + full[..., 0, 0] - full[..., 0, 1] - full[..., 1, 0]
    assert_close(margin, by_hand)
    assert_close(reduced(full, "margin"), by_hand)


@pytest.mark.parametrize("implementation", ["factors", "jacobian", "jvp"])
def test_contrasts_and_their_trace_are_those_of_the_full_kernel(implementation):
    model, inputs = built("mlp")
    options = {"outputs": BY_NAME["mlp"].outputs, "implementation": implementation}
    full = empirical_ntk(model, inputs, space=Rows(2), **options)
    # The trace is over all outputs less what they have in common.
    c = full.shape[2]
    trace = torch.einsum("nmcc->nm", full) - full.sum(dim=(2, 3)) / c
    options |= {"space": Rows(2)}
    assert_close(
        empirical_ntk(model, inputs, reduce="contrast_trace", **options), trace
    )
    contrast = empirical_ntk(model, inputs, reduce="contrast", **options)
    assert contrast.shape[2:] == (c - 1, c - 1)
    assert_close(reduced(full, "contrast"), contrast)
    assert_close(reduced(full, "contrast_trace"), trace)


@pytest.mark.parametrize("c", [2, 3, 7])
def test_contrasts_are_orthonormal_and_ignore_a_constant(c):
    Q = contrasts(c)
    assert_close(Q.T @ Q, torch.eye(c - 1, dtype=torch.float64))
    assert_close(Q.sum(dim=0), torch.zeros(c - 1, dtype=torch.float64), floor=1e-15)
    assert_close(Q @ Q.T, torch.eye(c, dtype=torch.float64) - 1 / c)
    values = torch.randn(4, c, dtype=torch.float64)
    assert_close(ContrastReadout()(values + 5), values @ Q)


def test_one_output_has_no_contrast():
    with pytest.raises(ValueError, match=r"c=1; expected 2 outputs or more"):
        contrasts(1)
    with pytest.raises(ValueError, match=r"outputs have shape \(3, 1\).*two or more"):
        ContrastReadout()(torch.ones(3, 1))


def test_reducing_to_full_changes_nothing():
    kernel = torch.randn(2, 3, 4, 4)
    assert reduced(kernel, "full") is kernel
    with pytest.raises(ValueError, match="margin.* two outputs, but the kernel has 4"):
        reduced(kernel, "margin")


def test_gram_matrix_is_example_major():
    jacobian, other = torch.randn(3, 2, 7), torch.randn(4, 2, 7)
    kernel = torch.einsum("ncp,mdp->nmcd", jacobian, other)
    expected = jacobian.flatten(0, 1) @ other.flatten(0, 1).T
    assert_close(gram_matrix(kernel), expected, 1e-6)
    assert gram_matrix(expected) is expected


@pytest.mark.parametrize("name", BUILT)
def test_batch_size_does_not_matter(name):
    model, inputs = built(name, 5)
    expected = kernels(model, inputs)
    for size in (1, 2, 9):
        assert_all_close(kernels(model, inputs, batch_size=size), expected)


@pytest.mark.parametrize("name", BUILT)
def test_kernel_is_symmetric_and_positive(name):
    model, inputs = built(name, 5)
    for space, kernel in kernels(model, inputs).items():
        gram = gram_matrix(kernel)
        assert_close(gram, gram.T, 1e-14, of=space)
        values = torch.linalg.eigvalsh(gram)
        assert values[0] > -1e-13 * values[-1], space
        assert values[-1] > 0, space


@pytest.mark.parametrize("name", BUILT)
def test_permuted_examples_permute_the_kernel(name):
    model, inputs = built(name, 5)
    order = torch.tensor([3, 0, 4, 2, 1])
    expected = kernels(model, inputs)
    found = kernels(model, take(inputs, order))
    for space in SPACES:
        assert_close(found[space], expected[space][order][:, order], of=space)


@pytest.mark.parametrize("name", BUILT)
def test_other_examples_are_slices_of_the_joint_kernel(name):
    model, inputs = built(name, 5)
    joint = kernels(model, inputs)
    left, right = take(inputs, slice(0, 2)), take(inputs, slice(2, 5))
    assert_all_close(kernels(model, left, right), joint, (slice(0, 2), slice(2, 5)))
    # More examples on the left, and one alone.
    assert_all_close(kernels(model, right, left), joint, (slice(2, 5), slice(0, 2)))
    one = take(inputs, slice(0, 1))
    assert_all_close(kernels(model, one, right), joint, (slice(0, 1), slice(2, 5)))
    assert_all_close(kernels(model, right, one), joint, (slice(2, 5), slice(0, 1)))


@pytest.mark.parametrize("name", BUILT)
def test_first_batches_as_other_are_a_slice(name):
    model, inputs = built(name, 5)
    cuts = [slice(0, 1), slice(1, 3), slice(3, 5)]
    batches = [take(inputs, cut) for cut in cuts]
    joint = kernels(model, inputs)
    assert_all_close(kernels(model, batches), joint)
    assert_all_close(kernels(model, batches, 1), joint, (slice(None), slice(0, 1)))
    assert_all_close(kernels(model, batches, 2), joint, (slice(None), slice(0, 3)))
    cut = kernels(model, batches, 2, batch_size=1)
    assert_all_close(cut, joint, (slice(None), slice(0, 3)))


PADDED = ["bert", "roberta", "deberta-v2", "mpnet", "modernbert", "t5", "gpt2", "llama"]


@pytest.mark.parametrize("name", [*PADDED, "bloom", "falcon", "opt", "torch-encoder"])
def test_padding_does_not_matter(name):
    family = BY_NAME[name]
    model = family.build()
    longer = 7 if name == "torch-encoder" else 10
    shorter = 4  # what the last of three examples needs
    inputs = family.inputs()
    padding = torch.zeros(3, longer - 7, dtype=torch.long)
    padded = {key: torch.cat([v, padding], dim=1) for key, v in inputs.items()}
    expected = kernels(model, inputs)
    assert_all_close(kernels(model, padded), expected)
    if name != "torch-encoder":
        cut = {key: value[2:, :shorter] for key, value in inputs.items()}
        batches = [take(padded, slice(0, 2)), cut]
        assert_all_close(kernels(model, batches), expected)
        repeated = kernels(model, [cut, cut, take(padded, slice(0, 1))])
        index = [2, 2, 0]
        again = {space: k[index][:, index] for space, k in expected.items()}
        assert_all_close(repeated, again)


@pytest.mark.parametrize("implementation", ["jacobian", "jvp"])
def test_other_implementations_take_the_same_inputs(implementation):
    model, inputs = built("mpnet", 5)
    joint = kernels(model, inputs)
    batches = [take(inputs, slice(0, 1)), take(inputs, slice(1, 4))]
    found = kernels(model, batches, 1, implementation=implementation)
    assert_all_close(found, joint, (slice(0, 4), slice(0, 1)))
    other = take(inputs, slice(3, 5))
    found = kernels(model, batches, other, implementation=implementation, batch_size=2)
    assert_all_close(found, joint, (slice(0, 4), slice(3, 5)))


def test_several_spaces_equal_single_calls(bert):
    inputs = BY_NAME["bert"].inputs()
    together = empirical_ntk(bert, inputs, space=SPACES)
    for name, space in SPACES.items():
        assert_close(together[name], empirical_ntk(bert, inputs, space=space), of=name)


def test_full_is_the_default_space(bert):
    inputs = BY_NAME["bert"].inputs()
    assert_close(empirical_ntk(bert, inputs), kernels(bert, inputs)["full"], 1e-14)


def test_inputs_may_be_a_mapping_a_tokenizer_output_or_a_tensor(bert):
    inputs = BY_NAME["bert"].inputs()
    expected = kernels(bert, inputs)
    assert_all_close(kernels(bert, BatchEncoding(dict(inputs))), expected)
    whole = torch.randint(4, 60, (3, 7))
    named = kernels(bert, {"input_ids": whole})
    assert_all_close(kernels(bert, whole), named)
    # Values that are not tensors are passed on unchanged.
    extra = {"input_ids": whole, "output_hidden_states": True}
    assert_all_close(kernels(bert, extra), named)


@pytest.mark.parametrize("name", ["mlp", "bert", "t5"])
@pytest.mark.parametrize("n", [1, 2])
def test_one_example_and_one_output(name, n):
    model, inputs = built(name, 3)
    inputs = take(inputs, slice(0, n))

    def first(output):
        return dense.logits(output)[:, :1]

    found = empirical_ntk(model, inputs, outputs=first)
    gradients = list(dense.gradients(model, inputs, first).values())
    assert found.shape == (n, n, 1, 1)
    assert_close(found, dense.kernel(gradients))


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "gpt2", "llama", "bloom"])
def test_one_token(name):
    model = BY_NAME[name].build()
    ids = torch.tensor([[5], [9], [5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = kernels(model, inputs)
    assert_all_close(found, kernels(model, inputs, implementation="jacobian"))


@pytest.mark.parametrize("name", ["t5", "mpnet", "deberta-v2", "attention", "bert"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_as_many_examples_as_tokens(name, n):
    """The axes of examples and tokens could then be confused."""
    model, inputs = built(name, n)
    if isinstance(inputs, torch.Tensor):
        inputs = inputs[:, :n]
    else:
        inputs = {"input_ids": inputs["input_ids"][:, -n:].clamp(min=4)}
        inputs["input_ids"][:, -1] = 1
    one = take(inputs, slice(0, 1))
    expected = kernels(model, inputs, implementation="jacobian")
    assert_all_close(kernels(model, inputs), expected)
    model = BY_NAME[name].build()  # nothing is remembered of a new model
    found = kernels(model, [one, inputs])
    index = [0, *range(n)]
    for space in SPACES:
        assert_close(found[space], expected[space][index][:, index], of=space)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_is_float64_whatever_the_model(dtype):
    model, inputs = built("bert")
    expected = kernels(model, inputs)
    found = kernels(model.to(dtype), inputs)
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    for space in SPACES:
        assert found[space].dtype is torch.float64
        assert_close(found[space], expected[space], tolerance, of=space)


def state(model):
    """The state of a model that computing a kernel must not change."""
    hooks = [
        (name, kind, len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in vars(module)
        if kind.endswith("_hooks")
    ]
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {
            name: (id(p), p.requires_grad, p.grad)
            for name, p in model.named_parameters()
        },
        [(name, module.training) for name, module in model.named_modules()],
        [(name, sorted(vars(module))) for name, module in model.named_modules()],
        hooks,
    )


def assert_untouched(model, before):
    after = state(model)
    for name, value in before[0].items():
        assert torch.equal(after[0][name], value), name
    for found, expected in zip(after[1:], before[1:], strict=True):
        assert found == expected


@pytest.mark.parametrize("implementation", ["factors", "jacobian", "jvp"])
@pytest.mark.parametrize("name", ["bert", "cnn", "gpt2-lora", "torch-encoder"])
def test_model_is_restored(name, implementation):
    model, inputs = built(name)
    model.train()
    list(model.children())[0].eval()
    before, mode = state(model), torch.is_grad_enabled()
    compute(
        model,
        inputs,
        spaces={"": Full()},
        options=KernelOptions(implementation=implementation),
    )
    assert_untouched(model, before)
    assert torch.is_grad_enabled() == mode


@pytest.mark.parametrize("implementation", ["factors", "jacobian", "jvp"])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_model_is_restored_after_an_error(calls, implementation):
    count = 0

    def forward(m, x):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return m.head(torch.tanh(m.layer(x)))

    model = Lambda(forward, layer=nn.Linear(4, 3), head=nn.Linear(3, 2)).double()
    model.train()
    before = state(model)
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt):
        empirical_ntk(model, x, implementation=implementation, batch_size=1)
    assert_untouched(model, before)


def test_kernel_is_the_same_without_gradients_enabled(bert):
    inputs = BY_NAME["bert"].inputs()
    expected = kernels(bert, inputs)
    with torch.no_grad():
        assert_all_close(kernels(bert, inputs), expected)


@pytest.mark.parametrize("name", ["bert", "torch-encoder"])
def test_frozen_parameters_are_left_out_of_full_alone(name):
    model, inputs = built(name)
    expected = compute(model, inputs, spaces={"rows": Rows(2), "full": Full()})
    names = [n for n, _ in model.named_parameters()]
    for parameter, p in model.named_parameters():
        p.requires_grad_(parameter == names[-1])
    found = compute(model, inputs, spaces={"rows": Rows(2), "full": Full()})
    assert_close(found.kernels["rows"], expected.kernels["rows"])
    assert found.sizes["full"] == model.get_parameter(names[-1]).numel()
    own = dense.gradients(model, inputs)[names[-1]]
    assert_close(found.kernels["full"], dense.kernel([own]))
    model.requires_grad_(False)
    assert_close(kernels_of_rows(model, inputs), expected.kernels["rows"])
    with pytest.raises(ValueError, match="no parameters that require a gradient"):
        empirical_ntk(model, inputs)


def kernels_of_rows(model, inputs):
    return empirical_ntk(model, inputs, space=Rows(2))


def test_verdicts_do_not_outlive_a_change_of_the_model():
    model, inputs = built("mlp")
    empirical_ntk(model, inputs)
    model[1] = nn.Linear(6, 6).double()
    assert_close(
        empirical_ntk(model, inputs),
        empirical_ntk(model, inputs, implementation="jacobian"),
    )


@pytest.mark.parametrize(
    ("name", "reduce", "implementation"),
    pairs(BUILT, ["full", "trace"], ["factors", "jacobian"]),
)
def test_left_examples_may_be_stored_in_groups(
    name, reduce, implementation, monkeypatch
):
    model, inputs = built(name, 6)
    batches = [take(inputs, slice(i, j)) for i, j in ((0, 2), (2, 3), (3, 5), (5, 6))]
    options = {"reduce": reduce, "implementation": implementation}
    whole = compute(model, batches, 2, spaces=SPACES, options=KernelOptions(**options))
    other = compute(
        model, batches, batches[:2], spaces=SPACES, options=KernelOptions(**options)
    )
    held, store = [], engine.Engine._store

    def stored(self, side, *rest):
        held.append(sum(map(batch_length, side)))
        return store(self, side, *rest)

    monkeypatch.setattr(engine.Engine, "_store", stored)
    few = {"spaces": SPACES, "options": KernelOptions(**options), "left_bytes": 1}
    found = compute(model, batches, 2, **few)
    assert held == [3, 2, 1]
    apart = compute(model, batches, batches[:2], **few)
    assert held == [3, 2, 1, 3, 2, 1, 2, 1]
    for space in SPACES:
        assert found.traces[space] == pytest.approx(whole.traces[space], rel=1e-9)
        assert_close(found.kernels[space], whole.kernels[space], of=space)
        assert_close(apart.kernels[space], whole.kernels[space], of=space)
        assert_close(other.kernels[space], whole.kernels[space], of=space)
