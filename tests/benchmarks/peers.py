"""The same kernel by other means, on the same inputs.

Each peer returns the kernel ``(n, m, c, d)``, or ``(n, m)`` if traced, and is checked
against ours. They are what a user would write or install:

- the empirical NTK tutorial of torch.func: Jacobian contraction, whose second Jacobian
  is the first here (the tutorial computes it again, which costs twice as much), and
  NTK-vector products. `vmap` needs eager attention and a 4-D float mask;
- a loop over examples and outputs that keeps the Jacobian, then one matrix product;
- nngeometry's `GramMatrix` of its main branch. Release 0.4 refuses embeddings and, for
  all else, sequences; its error is recorded instead of a time.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from tests.benchmarks.setting import OUTPUTS, Batch, load_model


@dataclass
class Peer:
    """One other way to a kernel.

    Attributes:
        run: From a batch to the kernel.
        reduce: The reduction of ours that it is compared with.
        jacobians: Peak memory in Jacobians ``(c n, p)`` of float32, to skip in time.
        largest: Most examples it is run on.
        note: What the reader must know.
    """

    run: Callable[[Batch], Tensor]
    reduce: str = "full"
    jacobians: float = 1.1
    largest: int | None = None
    note: str = ""


def peers(model: nn.Module) -> dict[str, Callable[[], Peer]]:
    """Return the makers of all peers on a model, which raise where one cannot run."""
    return {
        "torch.func contraction": lambda: Peer(
            _contraction(model, "Naf,Mbf->NMab"),
            jacobians=1.7,
            note="vmap(jacrev), eager attention, second Jacobian reused",
        ),
        "torch.func contraction, trace": lambda: Peer(
            _contraction(model, "Naf,Maf->NM"),
            reduce="trace",
            jacobians=1.7,
            note="vmap(jacrev), eager attention, second Jacobian reused",
        ),
        "torch.func NTK-vector products": lambda: Peer(
            _products(model),
            jacobians=3.0,
            largest=8,
            note="vmap over all pairs of examples, eager attention",
        ),
        "per-example autograd loop": lambda: Peer(
            lambda batch: _loop(model, batch), note="Jacobian kept, one matrix product"
        ),
        "nngeometry": lambda: _nngeometry(model),
    }


def _function(model: nn.Module) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """Return parameters and the function of one example that vmap can map."""
    eager = load_model(attention="eager")
    eager.load_state_dict(model.state_dict())
    parameters = {name: p.detach() for name, p in eager.named_parameters()}

    def call(parameters: dict[str, Tensor], example: Batch) -> Tensor:
        inputs = {name: value[None] for name, value in example.items()}
        return functional_call(eager, parameters, (), inputs).logits[0]

    return parameters, call


def _float_mask(batch: Batch) -> Batch:
    """Return the batch with the mask as what is added to the attention scores."""
    mask = batch["attention_mask"]
    n, t = mask.shape
    added = torch.zeros(n, 1, t, t).masked_fill(
        mask[:, None, None, :] == 0, torch.finfo(torch.float32).min
    )
    return {"input_ids": batch["input_ids"], "attention_mask": added}


def _contraction(model: nn.Module, equation: str) -> Callable[[Batch], Tensor]:
    parameters, call = _function(model)

    def run(batch: Batch) -> Tensor:
        rows = vmap(jacrev(call), (None, 0))(parameters, _float_mask(batch))
        flat = [row.flatten(2) for row in rows.values()]
        return torch.stack([torch.einsum(equation, j, j) for j in flat]).sum(0)

    return run


def _products(model: nn.Module) -> Callable[[Batch], Tensor]:
    parameters, call = _function(model)

    def pair(one: Batch, other: Batch) -> Tensor:
        outputs, pull = vjp(lambda p: call(p, one), parameters)

        def column(direction: Tensor) -> Tensor:
            pulled = pull(direction)
            return jvp(lambda p: call(p, other), (parameters,), pulled)[1]

        return vmap(column)(torch.eye(len(outputs)))

    def run(batch: Batch) -> Tensor:
        some = _float_mask(batch)
        return vmap(vmap(pair, (None, 0)), (0, None))(some, some)

    return run


def _loop(model: nn.Module, batch: Batch) -> Tensor:
    parameters = list(model.parameters())
    n = len(batch["input_ids"])
    rows = torch.empty(n * OUTPUTS, sum(p.numel() for p in parameters))
    for i in range(n):
        logits = model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0]
        for k in range(OUTPUTS):
            gradients = torch.autograd.grad(
                logits[k], parameters, retain_graph=k < OUTPUTS - 1
            )
            torch.cat([g.flatten() for g in gradients], out=rows[i * OUTPUTS + k])
    gram = rows @ rows.T
    return gram.view(n, OUTPUTS, n, OUTPUTS).transpose(1, 2)


def nngeometry_version() -> str:
    """Return the version of nngeometry."""
    from nngeometry.layercollection import LayerCollection

    if "Embedding" in LayerCollection._known_modules:
        return "main branch (this file was written with c04b984, 2026-03-31)"
    return importlib.metadata.version("nngeometry")


def _nngeometry(model: nn.Module) -> Peer:
    """Return nngeometry; raises what it raises if absent or refusing a layer."""
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection
    from torch.utils.data import DataLoader, TensorDataset

    layers = LayerCollection.from_model(model)

    def logits(ids: Tensor, mask: Tensor, position: Tensor, kind: Tensor) -> Tensor:
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            token_type_ids=kind,
        ).logits

    def run(batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        # With the model's own (1, t) positions its kernel is wrong.
        position = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        data = TensorDataset(ids, mask, position, torch.zeros_like(ids))
        loader = DataLoader(data, batch_size=len(ids))
        kernel = GramMatrix(model, loader, logits, layer_collection=layers)
        return kernel.to_torch().permute(1, 3, 0, 2)

    return Peer(run, note=f"{nngeometry_version()}; one batch")
