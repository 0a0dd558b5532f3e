"""Graphs, checkpointing and dtypes of the transformer: what makes it fast on an accelerator, seen on a CPU."""

from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from lvdm.cli import main
from lvdm.condition import Condition
from lvdm.model.compilation import compile_transformer
from lvdm.model.norm import LayerNorm, RMSNorm
from lvdm.model.open_sora import OpenSoraT2VTransformer3DModel
from lvdm.model.rope import MAX_TABLES, RotaryEmbedding, rope_tables
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.sampling.outputs import RolloutGroup
from lvdm.sampling.rollout import rollout
from odvae.trainer.checkpointing import MODES, enable_checkpointing, repeated_blocks
from odvae.utils.compiler import check_compiler
from odvae.utils.errors import UserError


def make_model(layers=2) -> LVDMTransformer3DModel:
    torch.manual_seed(0)
    model = LVDMTransformer3DModel(in_channels=3, hidden_size=24, num_layers=layers, num_attention_heads=2, text_dim=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def make_inputs(frames=5, height=4, batch=2):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 3, frames, height, 4, generator=g), torch.rand(batch, frames, generator=g),
            torch.randn(batch, 3, 8, generator=g), torch.ones(batch, 3, dtype=torch.bool))


@pytest.fixture
def graphs():
    torch.compiler.reset()
    yield CompileCounter()
    torch.compiler.reset()


def test_a_rollout_has_two_graphs_however_long(graphs):
    condition = Condition(torch.ones(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))

    def latents(model):
        events = rollout(model, condition, condition, latents=9, height=4, width=4, seeds=[0], num_inference_steps=2)
        return torch.cat([event.latents for event in events if isinstance(event, RolloutGroup)], dim=2)

    model = make_model()
    plain = latents(model)
    compile_transformer(model, backend=graphs)
    torch.testing.assert_close(latents(model), plain, atol=1e-4, rtol=0)
    assert graphs.frame_count == 2


def test_a_training_has_two_graphs_however_many_sizes(graphs):
    """For each number of groups; the second when a size turns out to vary. Blocks share them."""
    model = make_model().train()
    compile_transformer(model, backend=graphs)
    for height in (4, 6, 8):
        model(*make_inputs(frames=1, height=height)).sample.sum().backward()
    assert graphs.frame_count == 2


def test_compilers_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="install g"):
        check_compiler(torch.device("cpu"))
    with pytest.raises(UserError, match="no repeated blocks"):
        compile_transformer(torch.nn.Linear(1, 1))


def test_layers_that_are_offloaded_one_by_one_are_not_compiled(capsys):
    assert main(["generate", "red", "--compile", "--offload", "sequential"]) == 2
    assert "give --offload model" in capsys.readouterr().err


class AttentionCalls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.count += "scaled_dot_product" in name and "backward" not in name and args[1].shape[2] >= args[0].shape[2]
        return func(*args, **(kwargs or {}))


def test_checkpointing_computes_again_what_it_says():
    """Three groups in each of two layers; attention to the text is not counted."""
    gradients, calls = [], {}
    for mode in MODES:
        model = make_model().train()
        enable_checkpointing(model, mode)
        with AttentionCalls() as attention:
            model(*make_inputs()).sample.square().mean().backward()
        calls[mode] = attention.count
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert calls == {"none": 6, "attention": 6, "full": 12}
    assert gradients[0].equal(gradients[1]) and gradients[0].equal(gradients[2])


def make_open_sora():
    torch.manual_seed(0)
    return OpenSoraT2VTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=3, num_layers=2,
                                         caption_channels=8)


@pytest.mark.parametrize("kind", ["lvdm", "open_sora"])
def test_the_residual_stream_has_the_compute_dtype(kind):
    """Under autocast with float32 weights, what training does, every block and norm takes and gives bfloat16; the
    output stays near that of float32."""
    latents, t, text, mask = make_inputs()
    model = make_model() if kind == "lvdm" else make_open_sora()
    inputs = (latents, t, text, mask) if kind == "lvdm" else (latents, torch.tensor([3, 700]), text, mask)
    exact, seen = model(*inputs).sample.detach(), []

    def record(module, args, out):
        seen.append((args[0].dtype, (out[0] if isinstance(out, tuple) else out).dtype))

    for block in repeated_blocks(model):
        for module in block.modules():
            if module is block or isinstance(module, (RMSNorm, LayerNorm)):
                module.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs).sample
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    torch.testing.assert_close(rough.detach().float(), exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def test_rotary_tables_are_made_once_and_few_are_kept(monkeypatch):
    made = []
    monkeypatch.setattr("lvdm.model.rope.rope_tables", lambda times, *a, **k: made.append(times) or
                        rope_tables(times, *a, **k))
    rope, device = RotaryEmbedding(12, 100.0), torch.device("cpu")
    with torch.inference_mode():
        first = rope([0, 1], 2, 2, device)
    assert rope((0, 1), 2, 2, device)[0] is first[0] and len(made) == 1 and not first[0].is_inference()
    for start in range(1, 2 * MAX_TABLES):
        rope([start], 2, 2, device)
    assert len(rope._cache._tables) == MAX_TABLES
    assert rope([0, 1], 2, 2, device)[0].equal(first[0]) and len(made) == 2 * MAX_TABLES + 1


def test_adapters_are_exchanged_in_a_compiled_model(graphs, tmp_path):
    """Added, exchanged and removed, each gives what it does uncompiled."""
    peft = pytest.importorskip("peft")
    inputs, plain, compiled = make_inputs(frames=1, batch=1), make_model(1), make_model(1)
    for name in ("first", "second"):
        source = make_model(1)
        torch.manual_seed(len(name))
        source.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        source.save_lora_adapter(tmp_path / name)
    compile_transformer(compiled, backend=graphs)

    def load(model, name):
        model.load_lora_adapter(tmp_path / name, prefix=None, use_safetensors=True, adapter_name=name)
        model.set_adapters([name], [0.5])

    outputs = []
    for change in (lambda model: None, lambda model: load(model, "first"), lambda model: load(model, "second"),
                   lambda model: model.unload_lora()):
        change(plain)
        change(compiled)
        with torch.no_grad():
            outputs.append(plain(*inputs).sample)
            torch.testing.assert_close(compiled(*inputs).sample, outputs[-1], atol=1e-5, rtol=0)
    assert not any(a.allclose(b, atol=1e-3) for a, b in pairwise(outputs)) and outputs[0].equal(outputs[3])
