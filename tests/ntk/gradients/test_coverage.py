"""Models that break rules on calls silently.

Every trap here once gave a wrong kernel without an error, or could.
"""

import gc
from weakref import ref

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import BY_NAME, Lambda, Mixture
from dense import assert_close
from torch import nn

from ntk.gradients.coverage import Service
from ntk.gradients.data_selection import calibrate
from ntk.gradients.factors import Matrix
from ntk.gradients.function import FunctionError
from ntk.kernels.empirical import compute
from ntk.kernels.features import Features
from ntk.kernels.options import KINDS, KernelOptions
from ntk.spaces.kinds import Columns, Full, Rows

D = 5


def check(model, inputs, other=None, space=None):
    """Compare with plain autograd; return how the parameters were served."""
    model = model.double()
    space = space or Full()
    result = compute(model, inputs, other, spaces={"": space})
    names = list(space.maps(model))
    left = dense.gradients(model, inputs)
    right = left if other is None else dense.gradients(model, other)
    expected = dense.kernel([left[n] for n in names], [right[n] for n in names])
    assert_close(result.kernels[""], expected)
    return result.services


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


def tokens_for(*firsts):
    """Return examples whose tokens are routed by the sign of their first feature."""
    x = noise(len(firsts), len(firsts[0]), D)
    x[..., 0] = x[..., 0].abs() * torch.tensor(firsts, dtype=torch.float64)
    return x


def hard_mixture():
    """Two experts; tokens with a negative first feature go to the first."""

    def forward(m, x):
        tokens = x.flatten(0, 1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(m.experts):
            chosen = ((tokens[:, 0] > 0) == number).nonzero()[:, 0]
            if len(chosen):
                out = out.index_add(0, chosen, torch.tanh(expert(tokens[chosen])))
        return m.head(out.view_as(x).mean(1))

    experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
    return Lambda(forward, experts=experts, head=nn.Linear(D, 2))


def test_experts_that_the_first_examples_do_not_use():
    x = tokens_for([-1, -1, -1], [-1, -1, -1], [1, -1, 1], [1, 1, -1])
    check(hard_mixture(), x)
    check(hard_mixture(), x, space=Full().at("experts.1"))
    check(hard_mixture(), [x[:2], x[2:]])
    check(hard_mixture(), x[:2], x[2:], space=Full().at("experts.0"))
    check(hard_mixture(), x[2:], x[:2], space=Full().at("experts.1"))


def test_experts_that_see_as_many_tokens_as_there_are_examples():
    x = tokens_for([-1, -1, -1], [-1, -1, -1], [-1, -1, 1], [1, 1, 1])
    check(hard_mixture(), [x[:2], x[2:]])


def test_experts_that_first_see_one_token_of_each_example():
    x = tokens_for([-1, 1, 1], [1, -1, 1], [-1, -1, 1], [1, 1, 1])
    check(hard_mixture(), [x[:2], x[2:]])
    check(hard_mixture(), [x[:2], x[2:]], space=Full().at("experts.0"))


def sorted_mixture():
    """Tokens sorted by expert go through a shared layer, then to the experts."""

    def forward(m, x):
        tokens = x.flatten(0, 1)
        number = (tokens[:, 0] > 0).long()
        order = number.argsort(stable=True)
        counts = [int((number == k).sum()) for k in range(2)]
        parts = m.layer(tokens[order]).split(counts)
        done = [torch.tanh(e(p)) for e, p in zip(m.experts, parts, strict=True)]
        out = torch.cat(done)[order.argsort()]
        return m.head(out.view_as(x).mean(1))

    experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
    return Lambda(forward, layer=nn.Linear(D, D), experts=experts, head=nn.Linear(D, 2))


@pytest.mark.parametrize("space", [Full(), Full().at("layer"), Full().at("experts")])
def test_experts_that_see_sorted_tokens(space):
    same = tokens_for([-1, -1, -1], [-1, -1, -1])
    one_each = tokens_for([-1, 1, 1], [-1, 1, 1])
    mixed = tokens_for([1, -1, -1], [1, 1, 1])
    check(sorted_mixture(), [one_each, mixed], space=space)
    swapped = tokens_for([1, 1, 1], [-1, -1, -1])
    check(sorted_mixture(), [same, mixed, swapped], space=space)


def test_soft_mixture_of_several_batches():
    family = BY_NAME["mixture"]
    x = family.inputs(7)
    check(Mixture(), [x[:1], x[1:3], x[3:]])


def overwriting(change):
    """A layer's output is changed in place; in three dimensions it is a view."""

    def forward(m, x):
        h = change(m.layer(torch.tanh(m.before(x))), x[..., 0] == 0)
        return m.head(torch.tanh(h).sum(1))

    layers = {"before": nn.Linear(D, D), "layer": nn.Linear(D, D)}
    return Lambda(forward, **layers, head=nn.Linear(D, 2))


def overwritten(h, padded):
    if padded.any():
        h[padded] = 0.0
    return h


def halved_part(h, padded):
    h[..., :2].mul_(0.5)
    return h


CHANGES = {
    "overwritten": overwritten,
    "relu": lambda h, padded: torch.relu_(h),
    "added": lambda h, padded: h.add_(1.0),
    "scaled": lambda h, padded: h.mul_(0.5),
    "part": halved_part,
}


@pytest.mark.parametrize("change", CHANGES)
def test_output_changed_in_place(change):
    x = noise(4, 3, D)
    x[2:, 1:] = 0
    for inputs in (x, x.flip(0), [x[:2], x[2:]]):
        check(overwriting(CHANGES[change]), inputs)


@pytest.mark.parametrize("change", CHANGES)
def test_output_changed_in_place_after_other_questions(change):
    model, x = overwriting(CHANGES[change]).double(), noise(3, 4, D)
    for space in (Full().at("before"), Full().at("layer"), Rows(1).at("layer")):
        compute(model, x, spaces={"": space})
    calibrate(Rows(2, strategy="activation").at("layer"), model, x)
    check(model, x)


def test_examples_of_another_shape_than_were_compared():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.ReLU(inplace=True))
    model.append(Lambda(lambda m, h: m.last(h.flatten(1)[:, :D]), last=nn.Linear(D, 2)))
    check(model, noise(3, D))
    check(model, noise(3, 2, D))


def plain():
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2))


def test_inputs_that_take_gradients():
    x, model = noise(4, D), plain()
    check(model, x)
    trained = x.clone().requires_grad_()
    check(model, trained)
    check(model, [x[:2], trained[2:]])


def test_a_trained_tensor_that_is_no_parameter():
    hidden = noise(D)
    model = Lambda(
        lambda m, x: m.head(torch.tanh(m.layer(x + hidden))),
        layer=nn.Linear(D, D),
        head=nn.Linear(D, 2),
    )
    x = noise(3, D)
    check(model, x)
    hidden.requires_grad_()
    check(model, x)
    compute(model, x, spaces={"": Full()})
    compute(model, noise(2, D), spaces={"": Full()})


@pytest.mark.parametrize("implementation", ["factors", "autograd", "jacobian"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_no_number_is_refused(kind, implementation):
    model = Lambda(
        lambda m, x: m.head(torch.where(x < 9, m.layer(x), (m.layer(x) * 0).sqrt())),
        layer=nn.Linear(D, D),
        head=nn.Linear(D, 2),
    )
    with pytest.raises(FunctionError, match=r"'layer\.(weight|bias)' has \d+ NaN"):
        compute(
            model.double(),
            noise(3, D),
            spaces={"": Full().at("layer")},
            options=KernelOptions(kind=kind, implementation=implementation),
        )


def test_a_weight_that_is_cast_up():
    model = Lambda(
        lambda m, x: m.head(F.linear(x.float(), m.layer.weight.float()).to(x.dtype)),
        layer=nn.Linear(D, D, bias=False),
        head=nn.Linear(D, 2),
    ).bfloat16()
    x = noise(3, D).bfloat16()
    spaces = {"rows": Rows(2).at("layer"), "columns": Columns(2).at("layer")}
    result = compute(model, x, spaces=spaces).kernels
    wide = compute(model.double(), x.double(), spaces=spaces).kernels
    for name in spaces:
        assert_close(result[name].double(), wide[name].double(), 0.05)


def test_results_that_are_single_numbers():
    model = Lambda(
        lambda m, x: m.head(x) * (m.scale * m.two) + m.table(torch.tensor(1)),
        head=nn.Linear(D, 2),
        table=nn.Embedding(3, 2),
    )
    model.scale = nn.Parameter(torch.tensor(0.5))
    model.register_buffer("two", torch.tensor(2.0))
    model, x, spaces = model.double(), noise(3, D), {"": Full()}
    result = compute(model, x, spaces=spaces)
    expected = compute(
        model, x, spaces=spaces, options=KernelOptions(implementation="jacobian")
    )
    assert_close(result.kernels[""], expected.kernels[""])


def test_verdicts_do_not_keep_models():
    def asked():
        model = plain().double()
        for _ in range(3):
            closure = lambda output: (model, output)[1]
            compute(
                model,
                noise(2, D),
                spaces={"": Full()},
                options=KernelOptions(outputs=closure),
            )
        return ref(model)

    alive = asked()
    gc.collect()
    assert alive() is None


def test_an_exception_in_a_pass_leaves_nothing_behind(monkeypatch):
    model, seen = plain().double(), []
    compute(model, noise(2, D), spaces={"": Full()})

    def fail(self, use, k, factor):
        seen.append(ref(factor.x if isinstance(factor, Matrix) else factor.v))
        raise RuntimeError("stop")

    monkeypatch.setattr(Features, "receive", fail)
    with pytest.raises(RuntimeError, match="stop") as caught:
        compute(model, noise(2, D), spaces={"": Full()})
    assert all(p.requires_grad for p in model.parameters())
    assert seen
    assert "stop" in str(caught.value)


def conditional(**parts):
    """A parameter that only batches with a marked example use."""

    def forward(m, x):
        h = m.layer(x)
        marked = (x[..., :1] > 0).double()
        if bool(marked.any()):
            h = h + m.extra(x) * marked if hasattr(m, "extra") else h + m.token * marked
        return m.head(torch.tanh(h).flatten(2).mean(2))

    return Lambda(forward, head=nn.Linear(3, 2), **parts)


@pytest.mark.parametrize("marked", [0, 1])
@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D)])
def test_token_that_some_batches_do_not_use(shape, marked):
    token = nn.Parameter(noise(*shape))
    model = conditional(layer=nn.Linear(D, D), token=token)
    x = noise(4, 3, D)
    x[..., 0] = -1
    x[2 * marked : 2 * marked + 2, :, 0] = 1
    check(model, [x[:2], x[2:]])
    check(model, [x[:2], x[2:]], space=Full().at("token"))


@pytest.mark.parametrize("marked", [0, 1])
def test_token_that_one_side_does_not_use(marked):
    token = nn.Parameter(noise(1, D))
    model = conditional(layer=nn.Linear(D, D), token=token)
    x = noise(4, 3, D)
    x[..., 0] = -1
    x[2 * marked : 2 * marked + 2, :, 0] = 1
    check(model, x[:2], x[2:], space=Full().at("token"))


@pytest.mark.parametrize("marked", [0, 1])
def test_convolution_that_some_batches_do_not_use(marked):
    convolution = {"layer": nn.Conv1d(3, 3, 3), "extra": nn.Conv1d(3, 3, 3)}
    x = noise(4, 3, D)

    def forward(m, x):
        on = (x[:, :1, :1] > 0).double()
        h = m.layer(x) + (m.extra(x) * on if bool(on.any()) else 0)
        return m.head(torch.tanh(h).mean(2))

    x[..., 0] = -1
    x[2 * marked : 2 * marked + 2, :, 0] = 1
    model = Lambda(forward, head=nn.Linear(3, 2), **convolution)
    check(model, [x[:2], x[2:]])
    check(model, [x[:2], x[2:]], space=Full().at("extra.weight"))


def with_unused():
    def forward(m, x):
        return m.head(torch.tanh(m.layer(x)))

    parts = {"layer": nn.Linear(D, 4), "unused": nn.Linear(D, 2)}
    return Lambda(forward, **parts, head=nn.Linear(4, 3)).double()


@pytest.mark.parametrize("implementation", ["factors", "jacobian", "jvp"])
@pytest.mark.parametrize("frozen", [False, True])
def test_unused_parameters_have_a_kernel_of_zeros(frozen, implementation):
    model = with_unused().requires_grad_(not frozen)
    result = compute(
        model,
        noise(4, D),
        spaces={"": Rows(1).at("unused")},
        options=KernelOptions(implementation=implementation),
    )
    assert result.kernels[""].shape == (4, 4, 3, 3)
    assert not result.kernels[""].any()
    assert result.sizes[""] == D
    if implementation == "factors":
        assert result.services == {"unused.weight": Service.UNUSED}


def operation(name, run):
    def forward(m, x):
        h = torch.tanh(m.before(x))
        return m.head(torch.tanh(m.after(run(m, h))))

    parts = {"before": nn.Linear(D, D), "after": nn.Linear(D, D)}
    scale = nn.Parameter(torch.randn(D))
    model = Lambda(forward, **parts, scale=scale, head=nn.Linear(D, 2))
    return pytest.param(model, id=name)


@pytest.mark.parametrize(
    "model",
    [
        operation("type_as", lambda m, h: h.type_as(m.scale) * m.scale),
        operation("to", lambda m, h: h.to(m.after.weight) * m.scale),
        operation("add by name", lambda m, h: torch.add(input=h, other=m.scale)),
        operation("subtract", lambda m, h: h - m.scale),
        operation("scale first", lambda m, h: m.scale * h + m.scale),
        operation("one plus scale", lambda m, h: h * (1 + m.scale.float().double())),
        operation("twice", lambda m, h: m.scale * (m.scale + h)),
    ],
)
def test_common_operations_are_served_in_batches(model):
    services = check(model, noise(4, D))
    assert set(services.values()) == {Service.BATCH}, services


@pytest.mark.parametrize(
    "model",
    [
        operation("alpha", lambda m, h: torch.add(h, m.scale, alpha=2)),
        operation("scale minus", lambda m, h: m.scale - h),
        operation("divide", lambda m, h: h / (2 + m.scale**2)),
        operation("where", lambda m, h: torch.where(h > 0, h * m.scale, m.scale)),
        operation("flipped", lambda m, h: h * m.scale.flip(0)),
        operation("sum", lambda m, h: h * m.scale.sum()),
        operation("outer", lambda m, h: h @ torch.outer(m.scale, m.scale)),
        operation("product", lambda m, h: h @ (m.after.weight @ m.before.weight)),
        operation("einsum", lambda m, h: torch.einsum("ni,oi->no", h, m.after.weight)),
        operation("of data", lambda m, h: F.layer_norm(h, (D,), m.scale, m.scale)),
        operation("normed", lambda m, h: h * m.scale / m.scale.norm()),
    ],
)
def test_unusual_operations_are_exact(model):
    check(model, noise(4, D))


@pytest.mark.parametrize("padding", [0, 3, -1])
def test_padding_token_has_no_gradient(padding):
    model = Lambda(
        lambda m, x: m.head(torch.tanh(m.table(x)).mean(1)),
        table=nn.Embedding(6, D, padding_idx=padding),
        head=nn.Linear(D, 2),
    )
    tokens = torch.tensor([[0, 1, 3], [5, 5, 0], [3, 2, 5]])
    assert set(check(model, tokens).values()) == {Service.BATCH}


def test_parametrized_weights_are_exact():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(D, 4)),
        nn.Tanh(),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.Linear(4, 2),
    )
    check(model, noise(4, D))
