"""Models whose forward pass does not fit the task that they are loaded for."""

import pytest
import torch
import transformers as tf
from checkpoints import SENTIMENT, causal_checkpoint, checkpoint, reviews

from rocoft.models.backbone import check_direction, load_backbone
from rocoft.models.pretrained import BackboneError
from rocoft.training.language import load_language_model

DTYPES = (torch.float32, torch.bfloat16)
SIZES = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CAUSAL = ["GPT2", "Llama", "OPT", "Bloom", "GPTNeoX", "Mixtral", "Mamba", "Falcon"]
ENCODERS = ["Bert", "Roberta", "Electra", "Camembert", "XLNet", "RoFormer", "BigBird"]


def built(kind, auto, **options):
    torch.manual_seed(0)
    sizes = SIZES | options
    if kind == "XLNet":
        del sizes["max_position_embeddings"]
        sizes["d_head"] = 8
    config = getattr(tf, f"{kind}Config")(**sizes)
    return auto.from_config(config).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CAUSAL)
def test_decoders_read_no_later_token(kind, dtype):
    model = built(kind, tf.AutoModelForCausalLM).to(dtype)
    check_direction(model, kind, causal=True)
    with pytest.raises(BackboneError, match="is no masked language model"):
        check_direction(model, kind, causal=False)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_refused_as_causal_models(kind):
    model = built(kind, tf.AutoModelForCausalLM)
    with pytest.raises(BackboneError, match="reads later tokens, so it would see"):
        check_direction(model, kind, causal=True)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "RoFormer", "Electra"])
def test_encoders_made_decoders_are_causal_models_and_no_masked_ones(kind):
    model = built(kind, tf.AutoModelForCausalLM, is_decoder=True)
    check_direction(model, kind, causal=True)
    masked = built(kind, tf.AutoModelForMaskedLM, is_decoder=True)
    with pytest.raises(BackboneError, match="would not see the text after the mask"):
        check_direction(masked, kind, causal=False)
    check_direction(built(kind, tf.AutoModelForMaskedLM), kind, causal=False)


def test_a_masked_checkpoint_is_no_causal_model(tmp_path):
    folder, _ = checkpoint(tmp_path, "BertForMaskedLM")
    with pytest.raises(BackboneError, match="would see the answer"):
        load_language_model(folder)
    with pytest.raises(BackboneError, match="would see the answer"):
        load_backbone(folder, reviews(prompt=SENTIMENT), readout="causal")
    assert load_backbone(folder, reviews(prompt=SENTIMENT)).readout == "masked"


def test_a_checkpoint_of_a_decoder_is_no_masked_model(tmp_path):
    folder, _ = checkpoint(tmp_path, "BertForMaskedLM", is_decoder=True)
    with pytest.raises(BackboneError, match="no masked language model"):
        load_backbone(folder, reviews(prompt=SENTIMENT), readout="masked")


def test_a_decoder_whose_first_token_is_classified_is_refused(tmp_path):
    folder, _ = checkpoint(tmp_path, is_decoder=True)
    with pytest.raises(BackboneError, match="reads the first token, which sees no"):
        load_backbone(folder, reviews(), readout="head")


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_decoders_whose_last_token_is_classified_are_accepted(tmp_path, kind):
    folder, _ = causal_checkpoint(tmp_path, kind)
    assert load_backbone(folder, reviews(), readout="head", head="random").new_head


def body_of(tmp_path, kind, **config):
    """Return the folder of a checkpoint without its output layer."""
    folder, model = causal_checkpoint(tmp_path, kind, **config)
    model.base_model.save_pretrained(folder)
    return folder, model


def test_a_body_without_its_output_layer_is_refused(tmp_path):
    folder, _ = body_of(tmp_path, "Llama", tie_word_embeddings=False)
    with pytest.raises(BackboneError, match=r"lacks 1 weights.*'lm_head\.weight'"):
        load_language_model(folder)
    with pytest.raises(BackboneError, match="needs a checkpoint with a language-model"):
        load_backbone(folder, reviews(prompt=SENTIMENT), readout="causal")


def test_a_body_whose_output_layer_is_its_embeddings_is_whole(tmp_path):
    folder, model = body_of(tmp_path, "Llama", tie_word_embeddings=True)
    loaded = load_language_model(folder).model
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_an_encoder_decoders_body_without_its_output_layer_is_refused(tmp_path):
    config = tf.PegasusConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        tie_word_embeddings=False,
    )
    causal_checkpoint(tmp_path)
    tf.PegasusModel(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="lacks 1 weights"):
        load_language_model(str(tmp_path))


def test_an_encoder_decoder_is_no_causal_model(tmp_path):
    config = tf.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
    )
    causal_checkpoint(tmp_path)
    tf.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="is an encoder-decoder"):
        load_backbone(str(tmp_path), reviews(prompt=SENTIMENT), readout="causal")
