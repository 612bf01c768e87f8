from __future__ import annotations

import dataclasses
import errno
import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from layersync_kernels import cli
from layersync_kernels.errors import CheckpointError, ConfigError
from layersync_kernels.sit.checkpoints import export as exporting
from layersync_kernels.sit.checkpoints.diffusers_keys import TIME_WEIGHT, from_diffusers, refit_time, to_diffusers
from layersync_kernels.sit.checkpoints.export import read_record
from layersync_kernels.sit.checkpoints.local import save_checkpoint
from layersync_kernels.sit.checkpoints.weights import fill_model, load_weights
from layersync_kernels.sit.commands.export import ExportCommand, export
from layersync_kernels.sit.config.io import save_config
from layersync_kernels.sit.config.run import CONFIG
from layersync_kernels.sit.models.embedders import TimestepEmbedder
from layersync_kernels.sit.models.registry import build_model
from layersync_kernels.sit.sampling.load import load_trained
from layersync_kernels.sit.spec import SampleSpec

from .tiny import run_state, tiny_config


def make_run(folder, *, shape=(1, 4, 4), **groups):
    """A run of a tiny model whose weights are away from the initialisation; ema, model and ema-0.5 differ."""
    config = tiny_config(**groups)
    torch.manual_seed(1)
    model = build_model(config.model, SampleSpec.of(shape), 3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ema = model.state_dict()
    fixed = {"pos_embed"} if config.model.positions == "sincos" else set()
    others = {
        stem: {name: value if name in fixed else value * factor for name, value in ema.items()}
        for stem, factor in (("model", 2), ("ema-0.5", 3))
    }
    folder.mkdir(parents=True)
    save_config(config, folder / CONFIG)
    state = run_state(5)
    state["data"]["shape"] = list(shape)
    save_checkpoint(folder, 5, {"ema": ema, **others}, state)
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def outputs(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, *model.spec.shape, generator=generator)
    t = torch.tensor([0.0, 1.0, 0.5, 0.123, 0.9])
    with torch.no_grad():
        return x, t, torch.tensor([0, 1, 2, 3, 0]), model(x, t, torch.tensor([0, 1, 2, 3, 0]))


def set_metadata(path, text):
    save_file(load_file(path), path, {"format": "pt", "layersync": text})


# One file


@pytest.mark.parametrize("which", ["ema", "model", "ema-0.5"])
def test_a_file_alone_gives_the_model_of_the_run(run, tmp_path, which):
    out = export(ExportCommand(run, out=tmp_path / "alone" / "model.safetensors", which=which))
    expected, alone = load_trained(run, which=which), load_trained(out)
    assert all(
        torch.equal(value, alone.model.state_dict()[name]) for name, value in expected.model.state_dict().items()
    )
    assert (alone.spec, alone.num_classes, alone.modality) == (expected.spec, 3, expected.modality)
    assert alone.model.num_heads == 2
    record = read_record(out)
    assert (record.which, record.step, record.samples_seen) == (which, 5, 25)
    assert list(out.parent.iterdir()) == [out]


def test_sample_takes_the_settings_of_the_file(tmp_path, capsys):
    """A model that predicts noise on another path samples wrongly with the defaults."""
    transport = dataclasses.replace(tiny_config().transport, path_type="gvp", prediction="noise")
    run = make_run(tmp_path / "run", transport=transport)
    file = tmp_path / "alone" / "model.safetensors"
    assert cli.main(["export", str(run), "--out", str(file)]) == 0
    arrays = [tmp_path / "run.npz", tmp_path / "file.npz"]
    for source, array in zip((run, file), arrays, strict=True):
        options = [
            "--device",
            "cpu",
            "--array",
            str(array),
            "--out",
            str(array.with_suffix(".png")),
            "--per-class",
            "2",
        ]
        assert cli.main(["sample", str(source), *options]) == 0, capsys.readouterr().err
    assert arrays[0].read_bytes() == arrays[1].read_bytes()


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_other_types(run, tmp_path, dtype, kind):
    out = export(ExportCommand(run, out=tmp_path / "half.safetensors", dtype=dtype))
    assert {tensor.dtype for tensor in load_file(out).values()} == {kind}
    expected, found = (outputs(load_trained(path).model)[-1] for path in (run, out))
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


def test_numbers_beyond_the_type_are_refused(run, tmp_path):
    checkpoint = next((run / "checkpoints").iterdir())
    tensors = load_file(checkpoint / "ema.safetensors")
    tensors["final_layer.linear.bias"][0] = 1e6
    save_checkpoint(run, 6, {"ema": tensors}, run_state(6))
    with pytest.raises(CheckpointError, match=r"final_layer\.linear\.bias .*float16.*another --dtype"):
        export(ExportCommand(run, out=tmp_path / "half.safetensors", dtype="fp16"))
    tensors["final_layer.linear.bias"][0] = torch.nan
    save_checkpoint(run, 7, {"ema": tensors}, run_state(7))
    with pytest.raises(CheckpointError, match=r"final_layer\.linear\.bias is not finite"):
        export(ExportCommand(run, out=tmp_path / "nan.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("groups", [{"positions": "rope"}, {"condition": "none"}, {"class_dropout": 0.0}])
def test_a_file_tells_what_shapes_do_not(tmp_path, groups):
    run = make_run(tmp_path / "run", shape=(2, 8), model=dataclasses.replace(tiny_config().model, **groups))
    model = load_trained(export(ExportCommand(run, out=tmp_path / "m.safetensors"))).model
    expected = load_trained(run).model
    args = torch.ones(1, 2, 8), torch.tensor([0.3]), torch.tensor([0])
    torch.testing.assert_close(model(*args), expected(*args), atol=0, rtol=0)


# For diffusers


@pytest.fixture
def transformer():
    return pytest.importorskip("diffusers").DiTTransformer2DModel


def test_diffusers_computes_the_same(run, tmp_path, transformer):
    out = export(ExportCommand(run, out=tmp_path / "dit", format="diffusers"))
    theirs, report = transformer.from_pretrained(out, subfolder="transformer", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, t, labels, expected = outputs(load_trained(run).model)
    assert expected.std() > 0.1
    with torch.no_grad():
        found = theirs(x, timestep=t, class_labels=labels).sample
    assert found.shape[1] == 2
    torch.testing.assert_close(found[:, :1], expected, atol=2e-5, rtol=1e-4)


def test_refitted_time_is_that_of_the_model_at_every_time(transformer):
    from diffusers.models.embeddings import Timesteps

    embedder = TimestepEmbedder(32).double()
    theirs = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=1)
    t = torch.rand(999, dtype=torch.float64)
    layer = embedder.mlp[0]
    taken = []
    layer.register_forward_hook(lambda module, args, output: taken.append(output - module.bias))
    embedder(t)
    torch.testing.assert_close(theirs(t).double() @ refit_time(layer.weight).T, taken[0], atol=2e-6, rtol=0)
    # Without it the frequencies differ:
    assert (theirs(t).double() @ layer.weight.T - taken[0]).abs().max() > 1e-4


def test_round_trip_bit_for_bit(run, tmp_path):
    out = export(ExportCommand(run, out=tmp_path / "dit", format="diffusers"))
    expected = load_weights(run).tensors
    for path in (out, out / "transformer"):
        found = load_weights(path).tensors
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    back = to_diffusers(from_diffusers(to_diffusers(expected, 3)), 3)
    assert all(torch.equal(value, back[name]) for name, value in to_diffusers(expected, 3).items())


def test_init_takes_what_diffusers_itself_wrote(tmp_path, transformer):
    config = tiny_config().model
    theirs = transformer(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=3, sample_size=4,
        patch_size=2, num_embeds_ada_norm=3,
    )  # fmt: skip
    first, *others = [block.norm1.emb for block in theirs.transformer_blocks]
    for other in others:
        other.load_state_dict(first.state_dict())
    theirs.save_pretrained(tmp_path / "dit")
    model = build_model(config, SampleSpec(1, (4, 4)), 3)
    fill_model(model, load_weights(tmp_path / "dit"))
    assert torch.equal(model.state_dict()[TIME_WEIGHT], first.state_dict()["timestep_embedder.linear_1.weight"])
    torch.testing.assert_close(model.pos_embed, theirs.pos_embed.pos_embed, atol=1e-6, rtol=0)
    with torch.no_grad():
        others[0].timestep_embedder.linear_1.bias.add_(1)
    theirs.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="different embedders"):
        load_weights(tmp_path / "other")


def test_init_takes_a_published_dit(run, tmp_path):
    """A bare state dict under the same names, as facebook's DiT-XL-2-256x256.pt is."""
    state = load_weights(run).tensors
    torch.save(state, tmp_path / "DiT.pt")
    model = build_model(tiny_config().model, SampleSpec(1, (4, 4)), 3)
    fill_model(model, load_weights(tmp_path / "DiT.pt"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((1, 4, 4), {"positions": "learnt"}, "--positions learnt"),
        ((1, 4, 4), {"positions": "rope"}, "--positions rope"),
        ((1, 4, 4), {"condition": "none"}, "--condition none"),
        ((1, 4, 4), {"class_dropout": 0.0}, "--class-dropout 0"),
        ((1, 4, 4), {"patch_size": (2, 4)}, "--patch-size 2 4"),
        ((1, 4, 8), {}, "4 x 8, which are not square"),
        ((2, 8), {}, "samples of 1 dimension"),
        ((1, 2, 4, 4), {}, "samples of 3 dimensions"),
    ],
)
def test_what_diffusers_cannot_express(tmp_path, shape, changes, message):
    run = make_run(tmp_path / "run", shape=shape, model=dataclasses.replace(tiny_config().model, **changes))
    with pytest.raises(ConfigError, match=rf"{re.escape(message)}.*--format safetensors"):
        export(ExportCommand(run, out=tmp_path / "dit", format="diffusers"))
    assert not (tmp_path / "dit").exists()


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"_class_name": "UNet2DModel"}', '{"_class_name": "DiTTransformer2DModel", "patch_size": 0}',
               '{"_class_name": "DiTTransformer2DModel", "sample_size": 100000000}']
)  # fmt: skip
def test_bad_config_of_diffusers(run, tmp_path, config):
    out = export(ExportCommand(run, out=tmp_path / "dit", format="diffusers"))
    (out / "transformer" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_weights(out)


def test_bad_names_of_diffusers(run, tmp_path):
    file = export(ExportCommand(run, out=tmp_path / "dit", format="diffusers")) / "transformer"
    file = file / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    for change, message in (
        ({"pos_embed.proj.weight": None}, "lacks"),
        ({"stranger": torch.ones(1)}, "stranger"),
        ({"transformer_blocks.987654321.a": torch.ones(1)}, "names 987654322 blocks"),
        ({"transformer_blocks.0.attn1.to_q.weight": torch.ones(3)}, "cannot be a SiT"),
    ):
        changed = {name: value for name, value in (whole | change).items() if value is not None}
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=message):
            load_weights(tmp_path / "dit")


# Cards


def code_of(card, language):
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_card_says_what_it_is_and_its_code_runs(run, tmp_path, monkeypatch, format):
    if format == "diffusers":
        pytest.importorskip("diffusers")
    out = tmp_path / "out" / ("model.safetensors" if format == "safetensors" else "dit")
    export(ExportCommand(run, out=out, format=format, card=True))
    folder = out.parent if format == "safetensors" else out
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert "license" not in yaml.safe_load(front)
    assert {"sit", "layersync", "images"} <= set(yaml.safe_load(front)["tags"])
    assert "# license: FILL IN" in front
    for said in ("step 5", "ema", "pairs auto, weight 0.2", "euler, 3 times, guidance 2", "Not stated", "3 classes"):
        assert said in body
    blocks = code_of(card, "python")
    assert len(blocks) == 2
    monkeypatch.chdir(folder)
    drawn = []
    for block in blocks:
        names = {}
        exec(block, names)
        drawn += [names[name] for name in ("values", "x", "weights") if name in names]
    assert drawn[0].shape == (2, 1, 4, 4)
    assert drawn[0].isfinite().all()
    if format == "diffusers":
        assert drawn[1].shape == (2, 1, 4, 4)
        assert drawn[1].isfinite().all()
    else:
        assert drawn[1].keys() == load_weights(run).tensors.keys()


def test_card_of_somebody_else_stays(run, tmp_path):
    (tmp_path / "out").mkdir()
    readme = tmp_path / "out" / "README.md"
    readme.write_text("mine")
    command = ExportCommand(run, out=tmp_path / "out" / "m.safetensors", card=True, overwrite=True)
    with pytest.raises(ConfigError, match=r"README\.md exists.*no card"):
        export(command)
    assert list(readme.parent.iterdir()) == [readme]
    readme.unlink()
    export(command)
    export(command)
    with pytest.raises(ConfigError, match=r"README\.md exists.*--overwrite"):
        export(dataclasses.replace(command, overwrite=False))


# Bad input


def test_weights_that_are_not_there_are_listed(run, tmp_path):
    for which in ("ema-0.9", "optimizer", "../ema"):
        with pytest.raises(ConfigError, match=r"has: ema, ema-0\.5, model"):
            export(ExportCommand(run, out=tmp_path / "m.safetensors", which=which))


def test_places_and_sources_that_do_not_do(run, tmp_path):
    file = export(ExportCommand(run, out=tmp_path / "m.safetensors"))
    for command, message in (
        (ExportCommand(run), "--out"),
        (ExportCommand(run, out=tmp_path / "m.pt"), r"\.safetensors"),
        (ExportCommand(run, out=file), "--overwrite"),
        (ExportCommand(file, out=tmp_path / "n.safetensors"), "is no run"),
        (ExportCommand(run, out=run, format="diffusers"), "--overwrite"),
        (ExportCommand(run, out=run, format="diffusers", overwrite=True), "is no export"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(command)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export(ExportCommand(tmp_path / "empty", out=tmp_path / "n.safetensors"))
    export(ExportCommand(run, out=file, which="model", overwrite=True))
    assert read_record(file).which == "model"


def test_overwriting_a_folder(run, tmp_path):
    out = export(ExportCommand(run, out=tmp_path / "dit", format="diffusers"))
    export(ExportCommand(run, out=out, format="diffusers", which="model", overwrite=True))
    assert read_record(out / "transformer" / "diffusion_pytorch_model.safetensors").which == "model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit", "run"]
    (out / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="is no export"):
        export(ExportCommand(run, out=out, format="diffusers", overwrite=True))


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_full_disk_keeps_what_was_there(run, tmp_path, monkeypatch, format):
    out = tmp_path / ("m.safetensors" if format == "safetensors" else "dit")
    command = ExportCommand(run, out=out, format=format, overwrite=True)
    export(command)
    before = load_weights(out).tensors

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(dataclasses.replace(command, which="model"))
    assert all(torch.equal(value, before[name]) for name, value in load_weights(out).tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, "run"])


def changed(record, place, value):
    record = json.loads(json.dumps(record))
    *way, last = place.split(".")
    inner = record
    for name in way:
        inner = inner[name]
    inner[last] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("step", 10**30), ("step", -1), ("step", "five"), ("stranger", 1), ("model.depth", 2**62), ("model.depth", 2),
        ("model.model", "UNet"), ("model.hidden_size", 2**40), ("model.hidden_size", 0),
        ("model.patch_size", 0), ("model.num_heads", 0), ("model.num_heads", 2**62), ("model.class_dropout", 0.0),
        ("model.condition", "none"), ("model.positions", "rope"), ("data.shape", [1, 2**40, 2**40]),
        ("data.shape", [1, 8, 8]), ("data.shape", []), ("data.num_classes", 2**50), ("data.num_classes", 0),
        ("data.modality", {"kind": "mel", "sample_rate": "x"}), ("transport.path_type", "x"),
        ("transport.time_shift", -1.0), ("sampling.sampling_steps", 0),
    ],
)  # fmt: skip
def test_metadata_that_are_not_so(run, tmp_path, place, value):
    file = export(ExportCommand(run, out=tmp_path / "m.safetensors"))
    record = dataclasses.asdict(read_record(file))
    set_metadata(file, changed(record, place, value))
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        load_trained(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, '{"step": NaN}', "9" * 5000, "\ud7ff"])
def test_metadata_that_are_no_record(run, tmp_path, text, capsys):
    file = export(ExportCommand(run, out=tmp_path / "m.safetensors"))
    set_metadata(file, text)
    with pytest.raises(CheckpointError, match=r"metadata of .*m\.safetensors"):
        load_trained(file)
    assert cli.main(["sample", str(file)]) == 1
    assert "m.safetensors" in capsys.readouterr().err


def test_metadata_of_a_text_model_over_weights_of_classes(run, tmp_path):
    """Nothing of a size that only the metadata name is allocated."""
    file = export(ExportCommand(run, out=tmp_path / "m.safetensors"))
    record = dataclasses.asdict(read_record(file))
    record["model"]["condition"], record["data"]["text_width"] = "cross", 2**50
    set_metadata(file, json.dumps(record))
    with pytest.raises(CheckpointError, match=r"m\.safetensors does not fit"):
        load_trained(file)


def test_foreign_metadata_are_not_ours(run, tmp_path):
    file = export(ExportCommand(run, out=tmp_path / "m.safetensors"))
    save_file(load_file(file), file, {"format": "pt", "title": "somebody else's"})
    assert read_record(file) is None
    with pytest.raises(CheckpointError, match="--num-heads"):
        load_trained(file)
    assert load_trained(file, num_heads=2).model.num_heads == 2
