"""What diffusers' own model tests hold a model to: offloading, casting, quantizers, adapters, fused projections and
compilation leave the output as it is. Both transformers, in which every weight is random."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn import functional as F

from lvdm.model.open_sora import OpenSoraT2VTransformer3DModel
from lvdm.model.projections import FusableAttention
from lvdm.model.transformer import LVDMTransformer3DModel

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


MODELS = {
    "lvdm": (LVDMTransformer3DModel,
             dict(in_channels=3, hidden_size=24, num_layers=2, num_attention_heads=2, text_dim=8),
             dict(latents=draw(2, 3, 3, 4, 4), timestep=draw(2, 3).sigmoid(), text=draw(2, 5, 8))),
    "open_sora": (OpenSoraT2VTransformer3DModel,
                  dict(num_attention_heads=2, attention_head_dim=12, in_channels=3, num_layers=2, caption_channels=8),
                  dict(hidden_states=draw(2, 3, 3, 4, 4), timestep=torch.tensor([3, 700]),
                       encoder_hidden_states=draw(2, 5, 8), encoder_attention_mask=torch.ones(2, 5))),
}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def make(kind):
    cls, config, _ = MODELS[kind]
    torch.manual_seed(0)
    model = cls(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def run(kind, model):
    with torch.no_grad():
        return model(**MODELS[kind][2]).sample


def attentions(model):
    return [module for module in model.modules() if isinstance(module, FusableAttention)]


def uses_joint_weights(model):
    with torch.no_grad():
        return [attention.project_fused(torch.zeros(1, 1, 24)) is not None for attention in attentions(model)]


def test_fused_projections_are_the_same_weights(kind, tmp_path):
    model = make(kind)
    before, names = run(kind, model), set(model.state_dict())
    size = model.get_memory_footprint()
    model.fuse_qkv_projections()
    assert all(uses_joint_weights(model)) and set(model.state_dict()) == names
    assert model.get_memory_footprint() == size  # no second copy
    torch.testing.assert_close(run(kind, model), before, atol=1e-5, rtol=0)
    model.double().float()
    assert all(uses_joint_weights(model)), "a cast separated them"
    with torch.no_grad():
        attentions(model)[0].to_v.weight.mul_(2)  # as an adapter's merge does: nothing is stale
    changed = make(kind)
    with torch.no_grad():
        attentions(changed)[0].to_v.weight.mul_(2)
    torch.testing.assert_close(run(kind, model), run(kind, changed), atol=1e-5, rtol=0)
    assert (run(kind, model) - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(value.equal(model.state_dict()[name]) for name, value in loaded.state_dict().items())
    model.unfuse_qkv_projections()
    assert not any(uses_joint_weights(model))


def test_fused_projections_can_be_trained(kind):
    plain, fused = make(kind).train(), make(kind).train()
    fused.fuse_qkv_projections()
    for model in plain, fused:
        model(**MODELS[kind][2]).sample.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert a.grad is not None and a.grad.any(), name
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


OFFLOADS = {
    "sequential": lambda model, folder: cpu_offload(model, torch.device("cpu"), offload_buffers=True),
    "leaves": lambda model, folder: model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "blocks": lambda model, folder: model.enable_group_offload(torch.device("cpu"), offload_type="block_level",
                                                               num_blocks_per_group=1),
    "disk": lambda model, folder: model.enable_group_offload(torch.device("cpu"), offload_type="block_level",
                                                             num_blocks_per_group=1, offload_to_disk_path=str(folder)),
    "leaves on disk": lambda model, folder: model.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder)),
}


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_is_exact(kind, offload, fused, tmp_path):
    """Every weight is read by its own module's forward, where a hook brings it in."""
    model = make(kind)
    before = run(kind, model)
    if fused:
        model.fuse_qkv_projections()
    OFFLOADS[offload](model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(run(kind, model), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_layerwise_casting(kind, fused):
    """Weights of the layers that are cast are stored in half precision, and compute in single precision."""
    model, expected = make(kind), make(kind)
    if fused:
        model.fuse_qkv_projections()
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    stored = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16}
    assert any("to_q" in name for name in stored) and not any("norm" in name for name in stored)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name in stored:
                parameter.copy_(parameter.half())
    torch.testing.assert_close(run(kind, model), run(kind, expected), atol=1e-5, rtol=0)


class PackedLinear(nn.Linear):
    """As a quantizer's layer: the weight is stored as bytes, of another shape."""

    @classmethod
    def of(cls, linear):
        packed = cls(1, 1, bias=False)
        packed.scale = linear.weight.detach().abs().amax() / 127
        packed.rows, packed.bias = len(linear.weight), linear.bias
        data = (linear.weight.detach() / packed.scale).round().to(torch.int8).view(torch.uint8)
        packed.weight = nn.Parameter(data.flatten(), requires_grad=False)
        return packed

    def dequantized(self):
        return (self.weight.view(torch.int8) * self.scale).view(self.rows, -1)

    def forward(self, x):
        assert x.is_floating_point()
        return F.linear(x, self.dequantized(), self.bias)


def test_quantized_layers(kind):
    model, expected = make(kind), make(kind)
    model.fuse_qkv_projections()
    for name, module in [*model.named_modules()]:
        if type(module) is nn.Linear:
            packed = PackedLinear.of(module)
            model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = packed
            expected.get_submodule(name).weight.data = packed.dequantized()
    torch.testing.assert_close(run(kind, model), run(kind, expected), atol=1e-5, rtol=0)


def test_lora_on_fused_projections(kind, tmp_path):
    from peft import LoraConfig

    model = make(kind)
    model.fuse_qkv_projections()
    before = run(kind, model)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False))
    adapted = run(kind, model)
    assert (adapted - before).abs().max() > 1e-3
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    torch.testing.assert_close(run(kind, model), before, atol=1e-6, rtol=0)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(run(kind, model), adapted, atol=1e-6, rtol=0)
    model.fuse_lora()
    torch.testing.assert_close(run(kind, model), adapted, atol=1e-5, rtol=0)
    model.unfuse_lora()
    torch.testing.assert_close(run(kind, model), adapted, atol=1e-5, rtol=0)
    model.fuse_lora()
    model.unload_lora()
    assert all(uses_joint_weights(model))
    torch.testing.assert_close(run(kind, model), adapted, atol=1e-5, rtol=0)


def test_attention_processors(kind):
    model = make(kind)
    assert len(model.attn_processors) == len(attentions(model)) == 4
    assert all(isinstance(module, AttentionModuleMixin) for module in attentions(model))
    model.set_attn_processor({name: AttnProcessor() for name in model.attn_processors})
    assert {type(processor) for processor in model.attn_processors.values()} == {AttnProcessor}
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({"a": AttnProcessor()})


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_a_whole_forward_is_one_graph(kind, fused):
    model = make(kind)
    before = run(kind, model)
    if fused:
        model.fuse_qkv_projections()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.compiler.set_stance("default"):
        torch.testing.assert_close(compiled(**MODELS[kind][2]).sample, before, atol=1e-5, rtol=0)
    torch.compiler.reset()
