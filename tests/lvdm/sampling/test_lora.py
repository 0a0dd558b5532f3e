"""LoRA adapters of a pipeline: round trips through files, several with weights, and what is refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from pipelines import SIZE, make_pipeline, make_requests
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter
from tiny_diffusers import make_diffusers_pipeline

from lvdm.adapter_files import check_adapters, misfit
from lvdm.cli import main
from lvdm.generation.fingerprints import fingerprints
from lvdm.generation.generate import generate
from lvdm.generation.latent_store import read_latent_metadata
from lvdm.sampling.lora import LoraFile, describe_adapters, load_adapters, unload_adapters
from lvdm.sampling.pipeline import LVDMPipeline
from lvdm.training.lora import LoraConfig, add_lora, merge_lora
from odvae.utils.errors import UserError


def make_adapter(folder, seed, **config):
    """Train nothing, but save an adapter as a training does; return the pipeline it is merged into."""
    pipeline = make_pipeline()
    add_lora(pipeline.transformer, LoraConfig(**dict(rank=2, alpha=4) | config))
    torch.manual_seed(seed)
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    merge_lora(pipeline.transformer, folder)
    return pipeline


def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("red", seed=0, output_type="latent", **SIZE).latents


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    merged = [sample(make_adapter(folder / name, seed)) for seed, name in enumerate(("a", "b"))]
    return folder, merged


def test_a_trained_adapter_loads_by_the_default_call(adapters):
    folder, (merged, _) = adapters
    names = load_file(folder / "a/pytorch_lora_weights.safetensors")
    assert names and all(name.startswith("transformer.blocks.") for name in names)
    assert any("to_out.0.lora_A" in name for name in names)
    pipeline = make_pipeline()
    pipeline.transformer.fuse_qkv_projections()
    plain = sample(pipeline)
    pipeline.load_lora_weights(folder / "a")
    assert (sample(pipeline) - plain).abs().max() > 0.01
    torch.testing.assert_close(sample(pipeline), merged, atol=1e-4, rtol=0)
    pipeline.fuse_lora()
    assert pipeline.num_fused_loras == 1
    torch.testing.assert_close(sample(pipeline), merged, atol=1e-4, rtol=0)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(sample(pipeline), plain, atol=1e-4, rtol=0)


def test_several_adapters_with_weights(adapters):
    folder, (only_a, only_b) = adapters
    pipeline = make_pipeline()
    plain = sample(pipeline)
    load_adapters(pipeline, [LoraFile(folder / "a", 0.5), LoraFile(folder / "b/pytorch_lora_weights.safetensors", 0.0)])
    assert pipeline.get_active_adapters() == ["a", "b"] and pipeline.get_list_adapters() == {"transformer": ["a", "b"]}
    assert [text.split()[0] for text in describe_adapters(pipeline.transformer).values()] == ["0.5", "0"]
    half = sample(pipeline)
    pipeline.set_adapters(["a", "b"], [1.0, 0.0])
    torch.testing.assert_close(sample(pipeline), only_a, atol=1e-4, rtol=0)
    pipeline.set_adapters("b")
    torch.testing.assert_close(sample(pipeline), only_b, atol=1e-4, rtol=0)
    pipeline.set_adapters(["a", "b"])
    assert all((sample(pipeline) - other).abs().max() > 0.01 for other in (half, only_a, only_b, plain))
    pipeline.disable_lora()
    torch.testing.assert_close(sample(pipeline), plain, atol=1e-5, rtol=0)
    assert describe_adapters(pipeline.transformer) == {}
    pipeline.enable_lora()
    pipeline.delete_adapters("a")
    assert pipeline.get_list_adapters() == {"transformer": ["b"]}
    torch.testing.assert_close(sample(pipeline), only_b, atol=1e-4, rtol=0)


def test_saved_adapters_are_the_same(adapters, tmp_path):
    folder, (merged, _) = adapters
    pipeline = make_pipeline()
    pipeline.load_lora_weights(folder / "a", adapter_name="x")
    LVDMPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(pipeline.transformer, adapter_name="x"),
                                   transformer_lora_adapter_metadata=pipeline.transformer.peft_config["x"].to_dict())
    again = make_pipeline()
    again.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(sample(again), merged, atol=1e-4, rtol=0)


def test_nothing_is_unpickled(adapters, tmp_path):
    path = tmp_path / "pytorch_lora_weights.bin"
    torch.save(load_file(adapters[0] / "a/pytorch_lora_weights.safetensors"), path)
    pipeline = make_pipeline()
    for source, options in ((path, {}), (tmp_path, {"weight_name": path.name})):
        with pytest.raises(UserError, match=r"read from \.safetensors only"):
            pipeline.load_lora_weights(source, **options)
    with pytest.raises(OSError):  # it is not found beside: no fallback to the pickle
        pipeline.load_lora_weights(tmp_path)
    with pytest.raises(UserError, match="saved as safetensors only"):
        LVDMPipeline.save_lora_weights(tmp_path, {"a.lora_A.weight": torch.zeros(1)}, safe_serialization=False)
    assert not pipeline.get_list_adapters()


def test_other_files_are_refused_by_name(adapters, tmp_path):
    folder, _ = adapters
    save_file({"unet.a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "unet.safetensors")
    save_file({"transformer.blocks.0.attn9.to_q.lora_A.weight": torch.zeros(2, 24),
               "transformer.blocks.0.attn9.to_q.lora_B.weight": torch.zeros(24, 2)}, tmp_path / "other.safetensors")
    trained = load_file(folder / "a/pytorch_lora_weights.safetensors")
    save_file({name: tensor.repeat(1, 2) for name, tensor in trained.items()}, tmp_path / "wide.safetensors")
    for files, message in ((["nowhere.safetensors"], "there is no LoRA"),
                           (["unet.safetensors"], "has none of its layers"),
                           (["other.safetensors"], "other.safetensors"),
                           (["wide.safetensors"], "cannot load the LoRA"),
                           (["x/a.safetensors", "y/a.safetensors"], "have one name")):
        with pytest.raises(UserError, match=message):
            load_adapters(make_pipeline(), [LoraFile(tmp_path / file) for file in files])


def test_a_weight_follows_the_file(tmp_path):
    odd = tmp_path / "odd:2"
    odd.touch()
    assert LoraFile.parse("a.safetensors:0.5") == LoraFile(Path("a.safetensors"), 0.5)
    assert LoraFile.parse(str(odd)) == LoraFile(odd, 1.0)
    assert LoraFile.parse("C:a") == LoraFile(Path("C:a"), 1.0)


def test_other_adapters_do_not_resume_a_video(adapters, tmp_path):
    folder, _ = adapters
    (request,), pipeline = make_requests(tmp_path), make_pipeline()
    load_adapters(pipeline, [LoraFile(folder / "a", 0.5)])
    generate(pipeline, [request])
    parts = read_latent_metadata(request.latents).parts
    weight, digest = parts["adapter a"].split()
    assert weight == "0.5" and len(digest) == 64 and fingerprints(pipeline) == parts
    for files in ([], [LoraFile(folder / "a")], [LoraFile(folder / "b", 0.5)]):
        other = make_pipeline()
        load_adapters(other, files)
        with pytest.raises(UserError, match=r"other settings .*another adapter a"):
            generate(other, [request])
    again = make_pipeline()
    load_adapters(again, [LoraFile(folder / "a", 0.5)])
    assert generate(again, [request]).reused == [request.target]


def test_generate_with_adapters_on_the_command_line(adapters, tmp_path):
    folder, _ = adapters
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    command = ["generate", "red", "--pipeline", str(tmp_path / "pipeline"), "--num-frames", "5", "--height", "16",
               "--width", "16", "--num-inference-steps", "1"]
    assert main([*command, "--out", str(tmp_path / "plain")]) == 0
    assert main([*command, "--out", str(tmp_path / "lora"), "--lora", f"{folder / 'a'}:0.5", "--lora",
                 str(folder / "b")]) == 0
    plain, adapted = (read_latent_metadata(next((tmp_path / name).glob("*.safetensors"))) for name in ("plain", "lora"))
    assert {"adapter a", "adapter b"} == set(adapted.parts) - set(plain.parts)
    json.dumps(adapted.parts)
    latents = [load_file(next((tmp_path / name).glob("*.safetensors")))["latents"] for name in ("plain", "lora")]
    assert np.abs(latents[0].numpy() - latents[1].numpy()).max() > 0.01
    assert main([*command, "--out", str(tmp_path / "lora")]) == 2  # without the adapters it is another video


def test_of_two_transformers_each_is_adapted_by_its_weights(tmp_path, caplog):
    caplog.set_level("INFO", "odvae")
    one, two = make_diffusers_pipeline("WanPipeline"), make_diffusers_pipeline("WanPipeline")
    two.register_modules(transformer_2=copy.deepcopy(two.transformer))
    files = {name: save_adapter(two.transformer, tmp_path, seed, name=f"{name}.safetensors")
             for seed, name in enumerate(("first", "second"))}
    weights = {name: load_file(file) for name, file in files.items()}
    weights["second"] = {f"transformer_2.{key.removeprefix('transformer.')}": value
                         for key, value in weights["second"].items()}
    files["both"] = tmp_path / "both.safetensors"
    save_file(weights["second"], files["second"])
    save_file(weights["first"] | weights["second"], files["both"])
    two.save_pretrained(tmp_path / "two")
    one.save_pretrained(tmp_path / "one")
    adapted = {"first": (True, False), "second": (False, True), "both": (True, True)}
    for name, expected in adapted.items():
        loras = [LoraFile(files[name], 0.5)]
        check_adapters(loras, tmp_path / "two")
        load_adapters(two, loras)
        models = two.transformer, two.transformer_2
        assert tuple(bool(describe_adapters(model)) for model in models) == expected
        assert all(describe_adapters(model)[name].startswith("0.5 ")
                   for model, has in zip(models, expected, strict=True) if has)
        (layer,) = (module for key, module in models[expected == (False, True)].named_modules()
                    if key == "blocks.0.attn1.to_q")
        side = "second" if name == "second" else "first"
        assert (layer.lora_A[name].weight == next(
            value for key, value in weights[side].items() if "attn1.to_q.lora_A" in key)).all()
        assert ("transformer and transformer_2" if all(expected) else "the only one") in caplog.messages[-1]
        unload_adapters(two)
    for name in ("second", "both"):
        with pytest.raises(UserError, match="two transformers"):
            load_adapters(one, [LoraFile(files[name])])
        assert "two transformers" in misfit(LoraFile(files[name]), tmp_path / "one")
