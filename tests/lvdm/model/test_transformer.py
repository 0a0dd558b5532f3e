"""Properties of the transformer, on tiny random weights (those initialized to zero are made random first)."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lvdm.model import attention
from lvdm.model.attention import SelfAttention
from lvdm.model.groups import attention_pairs, frame_positions, group_sizes
from lvdm.model.norm import rms_norm
from lvdm.model.presets import PRESETS
from lvdm.model.rope import apply_rope, rope_tables
from lvdm.model.transformer import LVDMTransformer3DModel
from odvae.utils.errors import UserError

TEXT_DIM = 8


def make_model(**config) -> LVDMTransformer3DModel:
    torch.manual_seed(0)
    model = LVDMTransformer3DModel(**dict(in_channels=3, hidden_size=24, num_layers=3, num_attention_heads=2,
                                          text_dim=TEXT_DIM) | config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def make_inputs(frames=5, batch=2, side=4, words=3):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(batch, 3, frames, side, side, generator=g), torch.rand(batch, frames, generator=g),
            torch.randn(batch, words, TEXT_DIM, generator=g), torch.ones(batch, words, dtype=torch.bool))


@pytest.fixture(scope="module")
def model():
    return make_model()


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).sample


def test_first_latent_is_a_group_of_its_own():
    assert group_sizes(5, 2) == (1, 2, 2) and group_sizes(6, 2) == (1, 2, 2, 1)
    assert group_sizes(1, 2) == (1,) and group_sizes(5, 2, first_alone=False) == (2, 2, 1)


def test_positions_stay_in_the_trained_range():
    assert frame_positions(5, 2) == (0, 1, 2, 3, 4) and frame_positions(1, 2) == frame_positions(1, 2, far=True) == (0,)
    assert frame_positions(7, 2, far=True) == (0, 3, 4, 5, 6, 7, 8)


def test_groups_are_causal(model):
    latents, t, text, mask = make_inputs()
    before = run(model, latents, t, text, mask)
    latents, t = latents.clone(), t.clone()
    latents[:, :, 3:] += 1
    t[:, 3:] = 0.5
    after = run(model, latents, t, text, mask)
    torch.testing.assert_close(after[:, :, :3], before[:, :, :3], atol=1e-6, rtol=0)
    assert (after[:, :, 3:] - before[:, :, 3:]).abs().max() > 1e-3
    latents[:, :, 2] += 1  # inside a group each frame sees the other
    assert (run(model, latents, t, text, mask)[:, :, 1] - after[:, :, 1]).abs().max() > 1e-3


def test_one_group_is_full_attention(model):
    latents, t, text, mask = make_inputs(frames=3)
    one = run(model, latents, t, text, mask, groups=[3])
    changed = latents.clone()
    changed[:, :, 2] += 1
    assert (run(model, changed, t, text, mask, groups=[3]) - one)[:, :, 0].abs().max() > 1e-3  # the first sees the last
    several = run(model, latents, t, text, mask, groups=[1, 2])
    assert (several - one)[:, :, 0].abs().max() > 1e-3
    last = make_model(num_layers=1)  # with a single layer the last group is the same: it sees everything in both
    torch.testing.assert_close(run(last, latents, t, text, mask, groups=[1, 2])[:, :, 1:],
                               run(last, latents, t, text, mask, groups=[3])[:, :, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["_native_math", "native", "flex"])
def test_every_attention_backend_gives_the_same(backend):
    latents, t, text, mask = make_inputs()
    model = make_model(num_layers=1)
    plain = run(model, latents, t, text, mask)
    history = model(latents[:, :, :3], t[:, :3], text, mask, return_history=True).history
    model.set_attention_backend(backend)
    assert all(m.processor._attention_backend == backend for m in model.modules() if isinstance(m, SelfAttention))
    torch.testing.assert_close(run(model, latents, t, text, mask), plain, atol=1e-5, rtol=0)
    later = run(model, latents[:, :, 3:], t[:, 3:], text, mask, positions=(3, 4), groups=(1, 1), history=history)
    longer = run(model, latents, t, text, mask, groups=(1, 2, 1, 1))[:, :, 3:]
    torch.testing.assert_close(later, longer, atol=1e-4, rtol=0)


def test_flex_attention_is_compiled_where_an_evaluation_compiles_nothing(monkeypatch):
    """Uncompiled it would write out all scores."""
    class OnDevice(torch.Tensor):
        is_cuda = True

    graphs = []
    compiled = torch.compile(lambda q, k, v, block_mask: q + v, backend=lambda graph, _: graphs.append(graph) or graph)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: compiled)
    q = torch.ones(1, 4, 2, 8).as_subclass(OnDevice)
    with torch.compiler.set_stance("force_eager"):
        assert attention._flex(q, q, q, None).eq(2).all()
        compiled(q, q, q, block_mask=None)  # the stance is as before
    assert len(graphs) == 1


@pytest.mark.parametrize("chunks", [[(1,), (2,), (2,)], [(1, 2), (2,)], [(1,), (2, 2)]])
def test_history_equals_one_pass_over_everything(model, chunks):
    latents, t, text, mask = make_inputs()
    whole = run(model, latents, t, text, mask)
    start, history, out = 0, None, []
    for groups in chunks:
        end = start + sum(groups)
        with torch.no_grad():
            chunk = model(latents[:, :, start:end], t[:, start:end], text, mask, groups=groups,
                          positions=range(start, end), history=history, return_history=True)
        out.append(chunk.sample)
        start, history = end, chunk.history
    assert history[0][0].shape == (2, 5 * 4, 2, 12)  # (B, tokens of all five frames, heads, head width)
    torch.testing.assert_close(torch.cat(out, 2), whole, atol=1e-4, rtol=0)


def test_samples_are_independent(model):
    inputs = make_inputs(batch=3)
    order = [2, 0, 1]
    torch.testing.assert_close(run(model, *(x[order] for x in inputs)), run(model, *inputs)[order], atol=1e-5, rtol=0)


def test_text_matters_and_padding_does_not(model):
    latents, t, text, mask = make_inputs(words=3)
    plain = run(model, latents, t, text, mask)
    padded = torch.cat([text, torch.full((2, 2, TEXT_DIM), 7.0)], 1)
    padded_mask = torch.cat([mask, torch.zeros(2, 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(run(model, latents, t, padded, padded_mask), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(model, latents, t, text), plain, atol=1e-5, rtol=0)
    assert (run(model, latents, t, text.flip(0), mask) - plain).abs().max() > 1e-3


def test_each_frame_has_its_own_timestep(model):
    latents, t, text, mask = make_inputs()
    other = t.clone()
    other[:, 3:] += 0.3
    difference = (run(model, latents, other, text, mask) - run(model, latents, t, text, mask)).abs()
    assert difference[:, :, :3].max() < 1e-6 and difference[:, :, 3:].max() > 1e-3


def test_initial_output_is_zero_with_a_gradient():
    latents, t, text, mask = make_inputs()
    model = LVDMTransformer3DModel(in_channels=3, hidden_size=24, num_layers=2, num_attention_heads=2, text_dim=8)
    sample = model(latents, t, text, mask).sample
    assert not sample.any()
    (sample - 1).square().mean().backward()
    assert model.project_out.weight.grad.any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_every_parameter(checkpointing):
    model = make_model().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    model(*make_inputs()).sample.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_checkpointing_gives_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*make_inputs()).sample.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_rope_depends_on_relative_position_however_far():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 2 * 3 * 3, 1, 16)

    def scores(start: int, height: int = 3) -> torch.Tensor:
        rope = rope_tables((start, start + 1), height, 3, 16)
        return torch.einsum("bnhd,bmhd->nm", apply_rope(q[:, :6 * height], rope), apply_rope(k[:, :6 * height], rope))

    near = scores(0)
    for start in (1, 1000, 10_000_000):
        torch.testing.assert_close(scores(start), near, atol=1e-5, rtol=0)
    token = torch.arange(18).view(2, 3, 3)  # one row and one column down or up gives the same score
    assert near[token[0, 0, 0], token[1, 1, 2]].item() == pytest.approx(near[token[0, 1, 0], token[1, 2, 2]].item(),
                                                                       abs=1e-5)
    assert len(near[0].unique()) == 18  # and every offset another one
    apply_rope(torch.zeros(1, 70 * 90 * 3, 1, 16), rope_tables(range(70), 90, 3, 16))  # any size


def test_only_the_clips_first_latent_has_an_absolute_position(model):
    latents, t, text, mask = make_inputs(frames=4)
    middle = run(model, latents, t, text, mask, positions=range(1, 5))
    far = run(model, latents, t, text, mask, positions=range(100_000, 100_004))
    torch.testing.assert_close(far, middle, atol=1e-4, rtol=0)
    assert (run(model, latents, t, text, mask, groups=(2, 2)) - middle).abs().max() > 1e-3


def test_frame_rate_scales_positions(model):
    latents, t, text, mask = make_inputs()
    plain = run(model, latents, t, text, mask)
    assert run(model, latents, t, text, mask, frame_rate=8.0).equal(plain)
    half = run(model, latents, t, text, mask, frame_rate=16.0)  # the same pictures in half the time
    assert (half - plain).abs().max() > 1e-3
    torch.testing.assert_close(half, run(model, latents, t, text, mask, positions=(0, 0.5, 1, 1.5, 2)))


def test_classes_and_no_condition():
    latents, t, text, mask = make_inputs()
    classes = make_model(text_dim=0, class_names=["jump", "run"])
    labels = [run(classes, latents, t, class_labels=torch.full((2,), label)) for label in range(3)]
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(labels)) and classes.no_class == 2
    both = make_model(class_names=["jump", "run"]).train()
    both(latents, t, text, mask, torch.tensor([0, 2])).sample.square().mean().backward()
    rows = both.class_embed.weight.grad.any(1).tolist()
    assert rows == [True, False, True]
    assert all(p.grad is not None and p.grad.any() for p in both.parameters())
    free = make_model(text_dim=0).train()
    free(latents, t).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in free.parameters())
    for model, condition in ((classes, {}), (both, {"text": text}), (free, {"text": text}), (make_model(), {})):
        with pytest.raises(UserError, match=r"was made (for|without) (text|class_labels): (pass it|leave it out)"):
            model(latents, t, **condition)


@pytest.mark.parametrize("options", [{}, {"text_dim": 0}, {"patch_size": 1}], ids=str)
def test_flops_equal_torchs_count(options):
    model, (latents, t, text, mask) = make_model(**options), make_inputs(words=3)
    condition = (text, mask) if model.config.text_dim else ()
    for groups in ((5,), (1, 2, 2)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(latents, t, *condition, groups=groups)
        assert model.flops(2, 5, 4, 4, 3, groups) == counter.get_total_flops()
    assert attention_pairs((2, 3), past=4) == 2 * 6 + 3 * 9


def test_presets_have_the_parameter_counts_in_their_names():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = LVDMTransformer3DModel.from_preset(name, in_channels=16, text_dim=768)
        expected = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.12), config
    with pytest.raises(UserError, match="choose from 5m, 30m"):
        LVDMTransformer3DModel.from_preset("huge")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_and_loaded_is_the_same(model, tmp_path, dtype):
    make_model().to(dtype).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded = LVDMTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype and dict(loaded.config)["hidden_size"] == 24 and not loaded.training
    inputs = make_inputs()
    torch.testing.assert_close(run(loaded, *inputs).float(), run(model, *inputs), rtol=0,
                               atol=1e-6 if dtype == torch.float32 else 0.05)
    if dtype == torch.float16:  # weights shipped in half precision are used in float32
        single = LVDMTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
        assert single.dtype == torch.float32
        torch.testing.assert_close(run(single, *inputs), run(model, *inputs), rtol=0, atol=0.02)


@pytest.mark.parametrize("change, message", [
    (lambda a: [a[0][:, :2], *a[1:]], "2 channels"),
    (lambda a: [a[0][..., :3], *a[1:]], "width 3 .* nearest is 4"),
    (lambda a: [a[0], a[1][:, :2], *a[2:]], r"\(2, 5\)"),
])
def test_wrong_shapes_are_named(model, change, message):
    with pytest.raises(UserError, match=message):
        model(*change(list(make_inputs())))


def test_wrong_groups_and_widths_are_named(model):
    with pytest.raises(UserError, match="sum to the 5"):
        model(*make_inputs(), groups=(1, 2))
    with pytest.raises(UserError, match="2 positions for 5"):
        model(*make_inputs(), positions=(0, 1))
    with pytest.raises(UserError, match="multiple of num_attention_heads"):
        LVDMTransformer3DModel(hidden_size=25, num_attention_heads=2)


@pytest.mark.parametrize("weight", [(8,), (2, 1, 8)])
def test_rms_norm_and_its_gradients(weight):
    """Compared with the formula in float64 and its gradients by autograd."""
    torch.manual_seed(0)
    inputs, exact = ([x.requires_grad_() for x in drawn] for drawn in zip(*(
        (x, x.double()) for x in (torch.randn(3, 5, 2, 4, 8), torch.randn(weight))), strict=True))
    grad = torch.randn(inputs[0].shape)
    output = rms_norm(*inputs, 1e-6)
    x, scale = exact
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    torch.testing.assert_close(output.double(), expected)
    gradients = torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(*gradients, check_dtype=False, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, rms_norm(inputs[0].detach(), inputs[1], 1e-6))  # the same without a gradient
