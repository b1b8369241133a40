"""The architectures of open models have their sizes."""

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.shapes import SHAPES, shape_config
from lowrank_rlhf.config import Base, Lora
from lowrank_rlhf.errors import UserError

# As published, tied embeddings once
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-1.5b": 1_543_714_304,
    "smollm3-3b": 3_075_098_624,
    "qwen2.5-3b": 3_085_938_688,
    "llama-3.1-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", SHAPES)
def test_it_has_as_many_parameters_as_the_model(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_an_unknown_shape_is_told():
    with pytest.raises(UserError, match=r"no shape 'gpt-5'; there are: smollm2-135m, "):
        Backbone(Base(model="random/gpt-5"))


@pytest.fixture
def small(monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(SHAPES, "small", {**SHAPES["qwen2.5-0.5b"], **sizes, "vocab_size": 300})


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_random_weights_train_like_a_model(small, quantization):
    """Also with biases, as Qwen's layers have."""
    backbone = Backbone(Base(model="random/small", quantization=quantization, device="cpu"))
    layers = [m for m in backbone.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == (14 if quantization == "nf4" else 0)
    assert not any(tensor.is_meta for tensor in [*backbone.model.parameters(), *backbone.model.buffers()])
    assert backbone.model.get_output_embeddings().weight is backbone.model.get_input_embeddings().weight
    backbone.add_role("policy", Lora(r=4))
    backbone.train_only("policy")
    ids = torch.randint(0, 258, (2, 8))
    attention, completion = torch.ones(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    completion[:, 4:] = True
    with backbone.use("policy", train=True):
        logps, entropy = backbone.token_logps(ids, attention, completion)
        logps.sum().backward()
    assert logps[completion].isfinite().all()
    assert float(entropy[completion].detach().mean()) < torch.tensor(300.0).log()
    assert all(float(p.grad.norm()) > 0 for p in backbone.parameters("policy") if p.shape[1] == 4)
