"""What the judge must get right, and what a call must leave as it was.

The right values come from `dense`, a loop of `torch.autograd.grad` that knows nothing
of the package, or from a model that says the same in plain words.
"""

import warnings
from functools import partial

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import FAMILIES, Lambda
from dense import assert_close
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from ntk.gradients.coverage import BatchDependenceError
from ntk.gradients.function import FunctionError
from ntk.kernels.empirical import empirical_ntk
from ntk.kernels.estimates import sketched_ntk
from ntk.kernels.options import IMPLEMENTATIONS
from ntk.linearization.model import linearize
from ntk.spaces.kinds import Full

D = 8
ALL = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def built(forward, **modules):
    torch.manual_seed(0)
    return Lambda(forward, **modules).double()


def right(model, x, outputs=None):
    """Return the kernel over all parameters that require gradients."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    gradients = dense.gradients(model, x, outputs)
    return dense.kernel([gradients[name] for name in names])


def state(model):
    """Return what must not change: objects, flags, modes, values and hooks."""
    parameters = {n: (p, p.requires_grad, p.grad) for n, p in model.named_parameters()}
    buffers = {n: (b, b.clone()) for n, b in model.named_buffers()}
    modes = [m.training for m in model.modules()]
    hooks = [
        (list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()
    ]
    return parameters, buffers, modes, hooks


def same(model, before):
    parameters, buffers, modes, hooks = before
    after, buffers_after, modes_after, hooks_after = state(model)
    assert parameters.keys() == after.keys()
    for name, (parameter, flag, gradient) in parameters.items():
        assert after[name][0] is parameter, name
        assert after[name][1] == flag, name
        assert after[name][2] is gradient, name
    for name, (buffer, value) in buffers.items():
        assert buffers_after[name][0] is buffer, name
        assert torch.equal(buffer, value), name
    assert (modes, hooks) == (modes_after, hooks_after)


def shared_module():
    layer = nn.Linear(D, D)
    return built(
        lambda m, x: m.head(torch.tanh(m.blocks[1](torch.tanh(m.blocks[0](x))))),
        blocks=nn.ModuleList([layer, layer]),
        head=nn.Linear(D, 2),
    )


@ALL
def test_a_module_that_is_registered_under_two_names(implementation):
    model, x = shared_module(), noise(4, D)
    model.head.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, weight = state(model), model.blocks[0].weight.clone()
    kernel = empirical_ntk(model, x, implementation=implementation)
    assert_close(kernel, right(model, x))
    same(model, before)
    assert isinstance(model.blocks[1].weight, nn.Parameter)
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, model.blocks[1].weight)


@ALL
def test_a_readout_that_uses_the_weights_of_the_model(implementation):
    model = built(
        lambda m, x: torch.tanh(m.layer(x)), layer=nn.Linear(D, D), head=nn.Linear(D, 2)
    )
    outputs = lambda hidden: model.head(hidden)
    kernel = empirical_ntk(
        model, noise(4, D), outputs=outputs, implementation=implementation
    )
    assert_close(kernel, right(model, noise(4, D), outputs))


def test_a_sketch_of_a_readout_that_uses_the_weights_of_the_model():
    model = built(
        lambda m, x: torch.tanh(m.layer(x)), layer=nn.Linear(D, D), head=nn.Linear(D, 2)
    )
    outputs = lambda hidden: model.head(hidden)
    found = sketched_ntk(model, noise(4, D), space=Full(), outputs=outputs)
    expected = right(model, noise(4, D), outputs)
    assert float((found.kernel - expected).norm() / expected.norm()) < 0.1


@ALL
def test_distances_to_prototypes(implementation):
    model = built(lambda m, x: -torch.cdist(m.layer(x), m.prototypes))
    model.layer = nn.Linear(D, 4).double()
    model.prototypes = nn.Parameter(noise(3, 4, seed=1))
    kernel = empirical_ntk(model, noise(5, D), implementation=implementation)
    assert_close(kernel, right(model, noise(5, D)))


class Held:
    """Calls a layer from where no module registers it."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


def by_closure(layer):
    return lambda x: layer(x)


HOLDERS = {
    "closure": by_closure,
    "object": Held,
    "partial": lambda layer: partial(lambda weight, x: x @ weight.T, layer.weight),
    "list": lambda layer: lambda x, held=[layer.weight]: x @ held[0].T,
}


@pytest.mark.parametrize("holder", HOLDERS)
@ALL
def test_weights_used_where_they_are_not_registered(holder, implementation):
    layer = nn.Linear(D, D, bias=False)
    model = built(lambda m, x: m.head(torch.tanh(call(x))), layer=layer)
    model.head = nn.Linear(D, 2).double()
    call = HOLDERS[holder](layer)
    x = noise(4, D)
    before = state(model)
    if implementation in ("factors", "autograd") or holder in ("closure", "object"):
        # A layer replaces its own weight, wherever it is called from.
        kernel = empirical_ntk(model, x, implementation=implementation)
        assert_close(kernel, right(model, x))
    else:
        with pytest.raises(FunctionError, match=r"cannot replace 'layer\.weight'"):
            empirical_ntk(model, x, implementation=implementation)
        with pytest.raises(FunctionError, match=r"cannot replace 'layer\.weight'"):
            linearize(model, Full())(x)
    same(model, before)


@ALL
def test_parametrised_weights_in_a_cache(implementation):
    model = built(
        lambda m, x: m.head(torch.tanh(m.layer(x))),
        layer=parametrizations.weight_norm(nn.Linear(D, D)),
        head=nn.Linear(D, 2),
    )
    x = noise(4, D)
    expected = right(model, x)
    with parametrize.cached():
        model(x)
        kernel = empirical_ntk(model, x, implementation=implementation)
    assert_close(kernel, expected)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_nothing_of_the_model_changes(family):
    model, inputs = family.build(), family.inputs()
    model.train()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(bool(number % 3))
        parameter.grad = torch.zeros_like(parameter) if number % 2 else None
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for implementation in ("factors", "autograd"):
            empirical_ntk(
                model,
                inputs,
                outputs=family.outputs,
                implementation=implementation,
                space={"full": Full()},
            )
            same(model, before)
    failing = lambda answer: 1 / 0
    for implementation in IMPLEMENTATIONS:
        with pytest.raises(ZeroDivisionError):
            empirical_ntk(model, inputs, outputs=failing, implementation=implementation)
        same(model, before)


def test_buffers_that_forward_changes():
    def forward(m, x):
        m.seen += len(x)
        m.total = m.total + x.sum()
        return m.head(x)

    model = built(forward, head=nn.Linear(D, 2))
    model.register_buffer("seen", torch.zeros(1))
    model.register_buffer("total", torch.zeros(1))
    before = state(model)
    kernel = empirical_ntk(model, noise(3, D))
    same(model, before)
    assert_close(kernel, right(model, noise(3, D)))


def test_hooks_of_gradients_neither_run_nor_go():
    model, x = built(lambda m, x: m.head(x), head=nn.Linear(D, 2)), noise(3, D)
    calls = []
    model.head.weight.register_hook(lambda g: calls.append(g) or 2 * g)
    model.head.weight.register_post_accumulate_grad_hook(calls.append)
    for implementation in IMPLEMENTATIONS:
        kernel = empirical_ntk(model, x, implementation=implementation)
        assert float(kernel[0, 0, 0, 0]) == pytest.approx(float(x[0] @ x[0]) + 1)
    assert not calls
    model(x).sum().backward()
    assert len(calls) == 2


class Doubled(torch.autograd.Function):
    """x -> 2 x W, which no rule sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.from_numpy(2 * x.detach().numpy() @ weight.detach().numpy())

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return 2 * g @ weight.T, 2 * x.T @ g


def branched(used, *, shared=False):
    """A branch that only some examples take, hidden in a function of its own."""

    def forward(m, x):
        h = torch.tanh(m.layer(x))
        special = m.layer.weight if shared else m.special
        if bool(used(x).any()):
            mask = used(x).to(x)[:, None]
            h = h + mask * Doubled.apply(h, special)
        return m.head(h)

    model = built(forward, layer=nn.Linear(D, D), head=nn.Linear(D, 2))
    model.special = nn.Parameter(noise(D, D, seed=3))
    return model


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [None, 1, 2])
def test_a_hidden_branch_that_the_first_examples_skip(shared, size):
    x = noise(5, D)
    x[:, 0] = torch.tensor([-1.0, -1.0, -1.0, 1.0, -1.0])
    model = branched(lambda x: x[:, 0] > 0, shared=shared)
    assert_close(empirical_ntk(model, x, batch_size=size), right(model, x))
    # Again, with verdicts that were kept.
    assert_close(empirical_ntk(model, x, batch_size=size), right(model, x))


def test_a_scripted_branch_that_the_first_examples_skip():
    def forward(m, x):
        h = torch.tanh(m.layer(x))
        if bool((x[:, 0] > 0).any()):
            h = torch.where((x[:, 0] > 0)[:, None], m.special(h), h)
        return m.head(h)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        special = torch.jit.script(nn.Linear(D, D).double())
    model = built(forward, layer=nn.Linear(D, D), head=nn.Linear(D, 2))
    model.special = special
    x = noise(4, D)
    x[:, 0] = torch.tensor([-1.0, -1.0, 1.0, -1.0])
    assert_close(empirical_ntk(model, x), right(model, x))


def test_a_flag_that_is_flipped_after_the_verdict():
    def forward(m, x):
        h = m.layer(x)
        if m.turned:
            # The halves of the batch lie behind one another.
            h = torch.cat([h, 2 * h]).view(2, len(x), -1).sum(0)
        return m.head(torch.tanh(h))

    model = built(forward, layer=nn.Linear(D, D), head=nn.Linear(D, 2))
    model.turned = False
    x = noise(4, D)
    assert_close(empirical_ntk(model, x), right(model, x))
    model.turned = True
    assert_close(empirical_ntk(model, x), right(model, x))


def two_halves():
    def forward(m, x):
        both = m.layer(torch.cat([x, -0.5 * x]))
        first, second = both.chunk(2)
        return m.head(torch.tanh(first + second.square()))

    return built(forward, layer=nn.Linear(D, D), head=nn.Linear(D, 2))


@pytest.mark.parametrize("kind", ["equal", "blank"])
def test_equal_or_blank_first_examples_prove_nothing(kind):
    x = noise(6, D)
    x[:2] = 0 if kind == "blank" else x[0].clone()
    model = two_halves()
    assert_close(empirical_ntk(model, x), right(model, x))
    warmed = two_halves()
    empirical_ntk(warmed, x[:2])
    assert_close(empirical_ntk(warmed, x), right(warmed, x))


def test_gradients_of_tiny_scale_in_float32():
    def forward(m, x):
        both = m.layer(torch.cat([x, -0.5 * x]))
        first, second = both.chunk(2)
        return m.head(x) + 1e-5 * (first + second.square())[:, :2]

    model = built(forward, layer=nn.Linear(D, D), head=nn.Linear(D, 2))
    space = Full().at("layer")
    names = ["layer.weight", "layer.bias"]
    gradients = dense.gradients(model, noise(6, D))
    expected = dense.kernel([gradients[name] for name in names])
    found = empirical_ntk(model.float(), noise(6, D).float(), space=space)
    assert_close(found, expected, tolerance=1e-4)


@ALL
def test_batch_dependence_that_only_a_later_example_shows(implementation):
    def forward(m, x):
        shift = torch.relu(x[:, :1]).sum(0)
        return m.head(torch.tanh(m.layer(x) + shift))

    x = noise(5, D)
    x[:, 0] = torch.tensor([-1.0, -1.0, 2.0, -1.0, -1.0])
    model = built(forward, layer=nn.Linear(D, D), head=nn.Linear(D, 2))
    if implementation in ("autograd", "jacobian"):
        pytest.skip("runs every example alone")
    for _ in range(2):
        with pytest.raises(BatchDependenceError, match="change with the other"):
            empirical_ntk(model, x, implementation=implementation)


def frames(layer):
    """Frames ``(n t, c, w)`` through a layer, as of a video."""

    def forward(m, x):
        n, t = x.shape[:2]
        h = torch.tanh(m.layer(x.flatten(0, 1)))
        return m.head(h.flatten(1).view(n, t, -1).mean(1))

    return built(forward, layer=layer, head=nn.Linear(24, 2))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 4, 3, padding=1),
        nn.Conv1d(4, 4, 3, padding=1, groups=2),
        nn.BatchNorm1d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(6),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_frames_through_convolutions_and_normalisations(layer):
    model, x = frames(layer).eval(), noise(3, 5, 4, 6)
    assert_close(empirical_ntk(model, x), right(model, x))


def test_checkpointing_that_is_not_reentrant():
    model = built(
        lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
        body=nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)),
        head=nn.Linear(D, 2),
    )
    x = noise(4, D)
    assert_close(empirical_ntk(model, x), right(model, x))


@pytest.mark.parametrize("first", [True, False])
def test_reentrant_checkpointing_is_refused(first):
    def forward(m, x):
        h = x if first else torch.tanh(m.before(x))
        return m.head(checkpoint(m.body, h, use_reentrant=True))

    model = built(
        forward,
        before=nn.Linear(D, D),
        body=nn.Sequential(nn.Linear(D, D), nn.Tanh()),
        head=nn.Linear(D, 2),
    )
    with pytest.raises(FunctionError, match="use_reentrant=True"):
        empirical_ntk(model, noise(4, D))


def test_derivatives_within_the_model():
    def forward(m, x):
        x = x.detach().requires_grad_()
        u = m.head(torch.tanh(m.layer(x)))
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.stack([u[:, 0], du.square().sum(1)], dim=1)

    model = built(forward, layer=nn.Linear(D, D), head=nn.Linear(D, 1))
    x = noise(4, D)
    assert_close(empirical_ntk(model, x), right(model, x))


def test_sparse_embeddings():
    model = built(
        lambda m, x: m.head(torch.tanh(m.table(x)).mean(1)),
        table=nn.Embedding(10, D, sparse=True),
        head=nn.Linear(D, 2),
    )
    x = torch.tensor([[1, 2, 2], [3, 1, 9], [0, 0, 4]])
    plain = built(
        lambda m, x: m.head(torch.tanh(m.table(x)).mean(1)),
        table=nn.Embedding(10, D),
        head=nn.Linear(D, 2),
    )
    plain.load_state_dict(model.state_dict())
    assert_close(empirical_ntk(model, x), right(plain, x))


def test_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2))
    x = noise(4, D).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernel = empirical_ntk(model, x)
    expected = empirical_ntk(model.double(), x.double())
    assert_close(kernel, expected, tolerance=0.05)


def test_models_without_values_are_refused():
    with torch.inference_mode():
        made = nn.Linear(D, 2).double()
    with pytest.raises(FunctionError, match="inference_mode"):
        empirical_ntk(made, noise(3, D))
    with torch.device("meta"):
        empty = nn.Linear(D, 2).double()
    with pytest.raises(FunctionError, match="meta device"):
        empirical_ntk(empty, noise(3, D))


def test_inputs_and_calls_in_inference_mode():
    model = nn.Linear(D, 2).double()
    expected = right(model, noise(3, D))
    with torch.inference_mode():
        kernel = empirical_ntk(model, noise(3, D))
    assert_close(kernel.clone(), expected)


@ALL
def test_functions_whose_derivatives_are_not_those_of_autograd(implementation):
    # A repeated token has a scaled gradient, which no forward derivative knows.
    model = built(
        lambda m, x: m.head(torch.tanh(m.table(x)).mean(1)),
        table=nn.Embedding(6, D, scale_grad_by_freq=True),
        head=nn.Linear(D, 2),
    )
    x = torch.tensor([[1, 2, 3], [4, 4, 0], [2, 0, 1]])
    kernel = empirical_ntk(model, x, implementation=implementation)
    assert_close(kernel, right(model, x))


def test_lazy_and_complex_parameters_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(FunctionError, match=r"'0\.weight' has no shape yet"):
        empirical_ntk(lazy, noise(3, D))
    model = nn.Linear(D, 2).to(torch.complex128)
    with pytest.raises(FunctionError, match="'weight' is complex"):
        empirical_ntk(model, noise(3, D))


@pytest.mark.parametrize("wrapped", ["scripted", "data parallel"])
def test_wrapped_models(wrapped):
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2)).double()
    x = noise(4, D)
    expected = right(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = (
            torch.jit.script(model) if wrapped == "scripted" else nn.DataParallel(model)
        )
        assert_close(empirical_ntk(whole, x), expected)


@ALL
@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_values_out_of_range_are_refused_with_a_magnitude(scale, implementation):
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: m.head(torch.tanh(m.layer(x))) * scale,
        layer=nn.Linear(D, D),
        head=nn.Linear(D, 2),
    )
    x = noise(4, D).float()
    match = r"norms of about \d\.\de[+-]\d+, whose products (over|under)flow in float32"
    if scale > 1 and implementation == "jvp":
        # Its products fail, so that the definition computes it, in float64.
        narrow = empirical_ntk(model, x, implementation=implementation)
        assert_close(narrow, right(model.double(), x.double()), tolerance=1e-4)
    else:
        with pytest.raises(FunctionError, match=match):
            empirical_ntk(model, x, implementation=implementation)
    wide = empirical_ntk(model.double(), x.double(), implementation=implementation)
    assert_close(wide / scale**2, right(model, x.double()) / scale**2)


@ALL
def test_a_detached_model_is_refused(implementation):
    for forward in (
        lambda m, x: m.head(x).detach(),
        torch.no_grad()(lambda m, x: m.head(x)),
        lambda m, x: F.one_hot(m.head(x).argmax(1), 2).to(x),
    ):
        model = built(forward, head=nn.Linear(D, 2))
        with pytest.raises(FunctionError, match="no gradient in any parameter"):
            empirical_ntk(model, noise(4, D), implementation=implementation)
