"""Tiny models with RoCoFT adapters for the tests."""

import torch
from cases import BY_NAME
from peft import get_peft_model

from rocoft import RoCoFTConfig
from rocoft.adapter.layer import RoCoFTLinear

FAMILIES = ["bert", "roberta", "deberta-v2", "gpt2", "llama", "bloom", "t5"]


AXES = ("row", "column", "both", "auto")


def read(family):
    return family.outputs or (lambda output: output.logits)


def adapted(model, *, filled=True, **options):
    model = get_peft_model(model, RoCoFTConfig(**{"r": 2} | options))
    if filled:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".rocoft_" in name:
                    parameter.normal_()
    return model.eval()


def layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, RoCoFTLinear)
    }


def named(model, part):
    return {n: p for n, p in model.named_parameters() if part in n}


def bert():
    return BY_NAME["bert"].build()
