"""Tiny random models of many families, and inputs for them.

Nothing is built at import. Every parameter is perturbed, so that ones, zeros and
symmetric initialisations cannot hide a mistake. All in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import torch.nn.functional as F  # noqa: N812
import transformers as tf
from torch import nn

WORDS = 60
FLOAT = torch.float64


def label_words_at_mask(output):
    return output.logits[:, 2, [3, 5]]


def label_words_at_end(output):
    return output.logits[:, -1, [3, 5]]


@dataclass(frozen=True)
class Family:
    """A model, its inputs, and what is known of how its parameters are served.

    Attributes:
        name: Its name in the tests.
        make: Makes the model from the global seed.
        inputs: Makes three examples (or as many as asked).
        outputs: The readout.
        without: Words in the names of spaces that select nothing of it.
        slow: How the parameters that match a glob are served, if not from factors
            of whole batches.
        fused: Whether it fuses query, key and value.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[..., Any] = field(default=lambda n=3: text(n))
    outputs: Callable[[Any], torch.Tensor] | None = None
    without: tuple[str, ...] = ()
    slow: dict[str, str] = field(default_factory=dict)
    fused: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make().to(FLOAT).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def __str__(self) -> str:
        return self.name


def text(n=3, length=7, end=None, decoder=False):
    """Token numbers, the first example whole and the next two padded."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, WORDS, (n, length), generator=generator)
    mask = torch.ones(n, length, dtype=torch.long)
    for i in range(n):
        stop = length - (0, 2, 3)[i % 3]
        tokens[i, stop:], mask[i, stop:] = 0, 0
        if end is not None:
            tokens[i, stop - 1] = end
    batch = {"input_ids": tokens, "attention_mask": mask}
    if decoder:
        batch["decoder_input_ids"] = tokens[:, :3].clone()
    return batch


def ended_text(n=3, length=7):
    return text(n, length, end=1)


def noise(*shape):
    def make(n=3):
        generator = torch.Generator().manual_seed(2)
        return torch.randn(n, *shape, generator=generator, dtype=FLOAT)

    return make


def pixels(n=3):
    return {"pixel_values": noise(3, 8, 8)(n)}


def sizes(text: str) -> dict[str, Any]:
    """Read a configuration such as "d_model=16 d_ff=24"."""
    return {key: int(value) for key, value in (p.split("=") for p in text.split())}


NUMBERS = f"vocab_size={WORDS} pad_token_id=0 bos_token_id=1 eos_token_id=2 "
SMALL = "hidden_size=16 num_hidden_layers=2 num_attention_heads=2 intermediate_size=24 "
SHORT = NUMBERS + SMALL + "max_position_embeddings=20 "
DECODER = SHORT + "num_key_value_heads=1 "
GPT2 = NUMBERS + "n_embd=16 n_layer=2 n_head=2 n_positions=20 "
T5 = (
    f"vocab_size={WORDS} d_model=16 d_kv=8 d_ff=24 num_layers=2 num_heads=2 "
    "relative_attention_num_buckets=4 relative_attention_max_distance=6 "
    "decoder_start_token_id=0 "
)
BART = (
    f"vocab_size={WORDS} d_model=16 max_position_embeddings=20 encoder_layers=2 "
    "decoder_layers=2 encoder_attention_heads=2 decoder_attention_heads=2 "
    "encoder_ffn_dim=24 decoder_ffn_dim=24 pad_token_id=0 bos_token_id=2 "
    "eos_token_id=1 decoder_start_token_id=1 forced_eos_token_id=1 "
)
DISTILBERT = f"vocab_size={WORDS} dim=16 n_layers=2 n_heads=2 hidden_dim=24 "
OPT = NUMBERS + (
    "hidden_size=16 num_hidden_layers=2 num_attention_heads=2 ffn_dim=24 "
    "max_position_embeddings=20 word_embed_proj_dim=8 "
)
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}


def of(kind: str, task: str, text: str, **config) -> Callable[[], nn.Module]:
    """Return a maker of a transformers model from the name of its family."""

    def make():
        options = getattr(tf, f"{kind}Config")(**sizes(text), **config)
        return getattr(tf, kind + task)(options)

    return make


def classifier(kind: str, text: str, **config) -> Callable[[], nn.Module]:
    return of(kind, "ForSequenceClassification", text, **config)


def lora_gpt2():
    options = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    return peft.get_peft_model(classifier("GPT2", GPT2)(), options)


def mlp():
    return nn.Sequential(
        nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)
    )


class Lambda(nn.Module):
    """Parts and what is done with them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def weight(*shape):
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


def convolutions():
    def forward(m, x):
        h = F.relu(m.norm(m.conv(x)))
        h = torch.tanh(m.group(m.strided(h)))
        return m.head(torch.tanh(m.hidden(h.flatten(1))))

    model = Lambda(
        forward,
        conv=nn.Conv2d(3, 4, 3, padding=1),
        norm=nn.BatchNorm2d(4),
        strided=nn.Conv2d(4, 6, 2, stride=2, bias=False),
        group=nn.GroupNorm(2, 6),
        hidden=nn.Linear(24, 5),
        head=nn.Linear(5, 3),
    )
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def sequence_convolutions():
    def forward(m, x):
        h = m.norm(m.conv(x))
        return m.head(torch.tanh(m.dilated(F.gelu(h))).mean(2))

    return Lambda(
        forward,
        conv=nn.Conv1d(4, 6, 3, padding=1),
        norm=nn.GroupNorm(3, 6),
        dilated=nn.Conv1d(6, 5, 2, dilation=2, stride=2),
        head=nn.Linear(5, 2),
    )


def torch_encoder():
    def forward(m, input_ids, attention_mask):
        h = m.table(input_ids) + m.position
        h = m.encoder(h, src_key_padding_mask=attention_mask == 0)
        return m.head(torch.tanh(h[:, 0]))

    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return Lambda(
        forward,
        table=nn.Embedding(WORDS, 16),
        position=weight(7, 16),
        encoder=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(16, 2),
    )


def sequence_first_attention():
    def forward(m, x):
        h = x.transpose(0, 1)
        h = h + m.attention(h, h, h, need_weights=False)[0]
        return m.head(torch.tanh(h).mean(0))

    return Lambda(forward, attention=nn.MultiheadAttention(8, 2), head=nn.Linear(8, 2))


def bare_parameters():
    def forward(m, x):
        h = torch.cat([m.token.expand(len(x), -1, -1), x @ m.product + m.shift], 1)
        return m.head(torch.tanh(h * m.scale).sum(1))

    return Lambda(
        forward,
        token=weight(1, 1, 6),
        product=weight(8, 6),
        shift=weight(6),
        scale=weight(6),
        head=nn.Linear(6, 2),
    )


def used_twice():
    def forward(m, x):
        return m.head(torch.tanh(m.layer(torch.tanh(m.layer(x)))))

    return Lambda(forward, layer=nn.Linear(8, 8), head=nn.Linear(8, 2))


def root_mean_square():
    def forward(m, x):
        h = F.rms_norm(m.layer(x), (6,), m.scale, 1e-6)
        return m.head(torch.tanh(h).mean(1))

    return Lambda(forward, layer=nn.Linear(8, 6), scale=weight(6), head=nn.Linear(6, 2))


class Mixture(nn.Module):
    """Experts that see only the tokens routed to them, gathered from all examples."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        odds = self.router(tokens).softmax(1)
        best = odds.max(1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            chosen = (best.indices == number).nonzero()[:, 0]
            part = torch.tanh(expert(tokens[chosen])) * best.values[chosen, None]
            out = out.index_add(0, chosen, part)
        return self.head(out.view_as(x).mean(1))


def changed_in_place():
    def forward(m, x):
        h = m.layer(x)
        h *= 2
        h.relu_()
        g = m.shifted(x)
        g += 1
        return m.head(torch.tanh(h + g))

    return Lambda(
        forward, layer=nn.Linear(8, 6), shifted=nn.Linear(8, 6), head=nn.Linear(6, 2)
    )


def flattened_tokens():
    def forward(m, x):
        h = torch.tanh(m.norm(m.layer(x.reshape(-1, 8))))
        return m.head(torch.tanh(m.second(h)).view(len(x), -1, 6).mean(1))

    return Lambda(
        forward,
        layer=nn.Linear(8, 6),
        norm=nn.LayerNorm(6),
        second=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    )


ROWS = ("rows", "last rows", "random rows", "columns", "random columns")
LORA = ("lora", "rescaled lora")
POSITIONS = {"*.relative_attention_bias.weight": "single"}
# Pools the tokens that a mask picks.
PICKS = {"classification_head.*": "single"}

TRANSFORMERS = [
    Family("bert", classifier("Bert", SHORT)),
    Family("roberta", classifier("Roberta", SHORT)),
    Family("xlm-roberta", classifier("XLMRoberta", SHORT)),
    Family("distilbert", classifier("DistilBert", DISTILBERT)),
    Family("albert", classifier("Albert", SHORT + "embedding_size=8")),
    Family("electra", classifier("Electra", SHORT + "embedding_size=8")),
    Family(
        "deberta-v2",
        classifier(
            "DebertaV2",
            SHORT + "position_buckets=4",
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            **DEBERTA,
        ),
        slow={
            "*.self.query_proj.*": "single",
            "*.self.key_proj.*": "single",
            "deberta.encoder.rel_embeddings.weight": "definition",
            "deberta.encoder.LayerNorm.*": "definition",
        },
    ),
    Family(
        "deberta",
        classifier("Deberta", SHORT, position_biased_input=False, **DEBERTA),
        slow={
            "*.self.pos_proj.weight": "single",
            "*.self.pos_q_proj.*": "single",
            "*.self.?_bias": "definition",
            "deberta.encoder.rel_embeddings.weight": "definition",
        },
        fused=True,
    ),
    Family("mpnet", classifier("MPNet", SHORT), slow=POSITIONS),
    Family(
        "modernbert",
        classifier(
            "ModernBert",
            SHORT
            + "local_attention=4 global_attn_every_n_layers=2 "
            + "cls_token_id=1 sep_token_id=2",
        ),
        fused=True,
    ),
    Family("t5", classifier("T5", T5), ended_text, slow=POSITIONS | PICKS),
    Family(
        "t5-generation",
        of("T5", "ForConditionalGeneration", T5),
        lambda n=3: text(n, decoder=True),
        label_words_at_end,
        without=("bias", "head"),
        slow=POSITIONS,
    ),
    Family("bart", classifier("Bart", BART), ended_text, slow=PICKS),
    Family("gpt2", classifier("GPT2", GPT2), fused=True),
    Family("gpt-neox", classifier("GPTNeoX", SHORT), fused=True),
    Family("opt", classifier("OPT", OPT)),
    Family(
        "bloom",
        classifier("Bloom", NUMBERS + "hidden_size=16 n_layer=2 n_head=2"),
        fused=True,
    ),
    Family("llama", classifier("Llama", DECODER), without=("bias",)),
    Family(
        "mistral",
        classifier("Mistral", DECODER + "sliding_window=4"),
        without=("bias",),
    ),
    Family("qwen2", classifier("Qwen2", DECODER)),
    Family("qwen3", classifier("Qwen3", DECODER + "head_dim=8"), without=("bias",)),
    Family("gemma", classifier("Gemma", DECODER + "head_dim=8"), without=("bias",)),
    Family("phi", classifier("Phi", SHORT)),
    Family("phi3", classifier("Phi3", DECODER), without=("bias",), fused=True),
    Family("falcon", classifier("Falcon", NUMBERS + SMALL), fused=True),
    Family(
        "vit",
        of("ViT", "ForImageClassification", SMALL + "image_size=8 patch_size=4"),
        pixels,
    ),
    Family("bert-mlm", of("Bert", "ForMaskedLM", SHORT), outputs=label_words_at_mask),
    Family(
        "llama-lm",
        of("Llama", "ForCausalLM", DECODER, tie_word_embeddings=True),
        outputs=label_words_at_end,
        without=("bias", "head"),
    ),
    Family("gpt2-lora", lora_gpt2, fused=True),
]
EMPTY = ("norm", "embeddings")
ATTENTION = {"*_proj*": "definition"}
MODULES = [
    Family("mlp", mlp, noise(8), without=EMPTY),
    Family("cnn", convolutions, noise(3, 4, 4), without=("embeddings",)),
    Family(
        "conv1d",
        sequence_convolutions,
        noise(4, 9),
        without=(*ROWS, *LORA, "embeddings"),
    ),
    Family("torch-encoder", torch_encoder, slow=ATTENTION, fused=True),
    Family(
        "attention",
        sequence_first_attention,
        noise(5, 8),
        without=EMPTY,
        slow=ATTENTION,
        fused=True,
    ),
    Family("bare", bare_parameters, noise(4, 8), without=(*ROWS, *LORA, *EMPTY)),
    Family("twice", used_twice, noise(8), without=EMPTY),
    Family("rms-norm", root_mean_square, noise(4, 8), without=EMPTY),
    Family(
        "mixture",
        Mixture,
        noise(5, 8),
        without=EMPTY,
        # Once tokens are picked, no first axis is trusted to be that of the examples.
        slow={"experts.*": "single", "head.*": "single"},
    ),
    Family(
        "in-place",
        changed_in_place,
        noise(8),
        without=EMPTY,
    ),
    Family("flattened", flattened_tokens, noise(4, 8), without=("embeddings",)),
]
FAMILIES = TRANSFORMERS + MODULES
BY_NAME = {family.name: family for family in FAMILIES}
