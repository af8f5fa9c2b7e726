"""Tiny GGUF files, each with a folder of the model made without transformers' reader.

Layout of the files: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and
llama.cpp's convert_hf_to_gguf.py.
"""

import gguf
import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer

WORDS = ("terrible", "great")
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
Q = gguf.GGMLQuantizationType
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
    # As the file holds it.
    "rms_norm_eps": float(np.float32(1e-5)),
}


def chains(words, space):
    """Return the merges that make each word after a space one token."""
    merges = []
    for word in words:
        start = space
        for letter in word:
            merges.append((start, letter))
            start += letter
    return list(dict.fromkeys(merges))


def byte_level():
    """Return the tokens, the merges and the tokenizer of GPT-2's kind."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = chains(WORDS, "Ġ")
    tokens = ["<|begin|>", "<|end|>", *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": tokens[0], "eos_token": tokens[1]}
    return (
        tokens,
        merges,
        tf.PreTrainedTokenizerFast(tokenizer_object=backend, **special),
    )


def sentencepiece():
    """Return the tokens, their types and the tokenizer of Gemma's kind."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    byte = [f"<0x{i:02X}>" for i in range(256)]
    merges = chains(WORDS, "▁")
    letters = ["▁", *(chr(i) for i in range(33, 127))]
    tokens = [*special, *byte, *letters, *("".join(pair) for pair in merges)]
    types = [CONTROL] * 3 + [UNKNOWN] + [BYTE] * 256
    types += [NORMAL] * (len(tokens) - len(types))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return (
        tokens,
        types,
        GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True),
    )


def blocks(weight, kind):
    """Return a weight's blocks, and the float32 weight that they stand for."""
    if kind != Q.Q4_K:
        quantised = gguf.quantize(weight, kind)
        return quantised, gguf.dequantize(quantised, kind)
    # gguf writes no such blocks, so these are random ones: 4-bit numbers in groups of
    # 32 under 6-bit scales under two halves.
    rows, columns = weight.shape
    draw = np.random.default_rng(weight.size)
    raw = draw.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    for place, scale in ((0, 2e-4), (2, 1.5e-3)):
        halves = np.full((rows, columns // 256, 1), scale, np.float16)
        raw[..., place : place + 2] = halves.view(np.uint8)
    quantised = raw.reshape(rows, -1)
    return quantised, gguf.dequantize(quantised, kind)


def paired(weight, heads):
    """Return query or key rows in the file's order: rotary pairs side by side."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def unpaired(weight, heads):
    """Return the rows in the model's order."""
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def model_of(family, vocabulary):
    """Return a small random model of a family."""
    sizes = SIZES | {"vocab_size": vocabulary, "initializer_range": 0.05}
    if family == "llama":
        config = tf.LlamaConfig(
            **sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1
        )
        return tf.LlamaForCausalLM(config)
    config = tf.Gemma2Config(**sizes, head_dim=64, sliding_window=64)
    return tf.Gemma2ForCausalLM(config)


def pair(folder, family, kind):
    """Write the GGUF file and the folder of one model.

    Args:
        folder: Where to.
        family: ``"llama"`` or ``"gemma2"``.
        kind: Name of the quantisation of matrices.

    Returns:
        The file and the folder.
    """
    kind = Q[kind]
    folder.mkdir(parents=True)
    file = folder / f"tiny-{family}.{kind.name}.gguf"
    writer = gguf.GGUFWriter(file, family)
    writer.add_name("tiny")
    writer.add_license("cc0-1.0")
    if family == "llama":
        tokens, merges, tokenizer = byte_level()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        types = [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_rope_dimension_count(64)
    else:
        tokens, types, tokenizer = sentencepiece()
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        for name, index in {"pad": 0, "eos": 1, "bos": 2, "unk": 3}.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(True)
        writer.add_key_length(64)
        writer.add_sliding_window(64)
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    model = model_of(family, len(tokens))
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "gemma2": gguf.MODEL_ARCH.GEMMA2}[family]
    names = gguf.get_tensor_name_map(arch, SIZES["num_hidden_layers"])
    heads = {
        "q_proj": SIZES["num_attention_heads"],
        "k_proj": SIZES["num_key_value_heads"],
    }
    for path, parameter in model.named_parameters():
        name = names.get_name(path.removesuffix(".weight")) + ".weight"
        value = parameter.detach().numpy()
        if value.ndim == 1:
            value = value + np.random.default_rng(1).normal(0, 0.1, value.shape)
            value = value.astype(np.float32)
            writer.add_tensor(name, value)
            if family == "gemma2":
                # The file holds the factor, the model its distance from one.
                value = value - np.float32(1)
        else:
            count = family == "llama" and heads.get(path.split(".")[-2])
            quantised, value = blocks(paired(value, count) if count else value, kind)
            writer.add_tensor(name, quantised, raw_dtype=kind)
            value = unpaired(value, count) if count else value
        parameter.data = torch.from_numpy(value.copy())
    finish(writer)
    twin = folder / "twin"
    # The file does not hold it; new heads are drawn by it.
    model.config.initializer_range = 0.02
    model.save_pretrained(twin)
    tokenizer.save_pretrained(twin)
    return file, twin


def finish(writer):
    """Write what a writer was told."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
