"""LayerSync on small models: blocks, layouts, life of the hooks, errors. The real libraries are in test_matrix.py."""

import copy
import dataclasses
import gc
import io
import logging
import math
import warnings
import weakref
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from layersync_kernels import LayerSync, layersync_loss
from layersync_kernels.integrate.capture import Captured
from layersync_kernels.modules.block import AdaLNZeroBlock
from layersync_kernels.modules.norm import Stream

from ..support.backends import device_of, mark

WIDTH = 16


class Block(nn.Module):
    def __init__(self, wrap=lambda x: x):
        super().__init__()
        self.fc1, self.fc2, self.wrap = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), wrap

    def forward(self, x):
        x = x[0] if isinstance(x, tuple) else x
        return self.wrap(x + self.fc2(self.fc1(x).tanh()))


class Model(nn.Module):
    def __init__(self, depth=5, name="blocks", wrap=lambda x: x, unwrap=lambda x: x, reentrant=None):
        super().__init__()
        self.name, self.unwrap, self.reentrant = name, unwrap, reentrant
        self.add_module(name, nn.ModuleList(Block(wrap) for _ in range(depth)))
        self.embed = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.embed(x)
        for block in getattr(self, self.name):
            y = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            x = self.unwrap(y)
        return x


def hidden_states(model, x):
    """Outputs of the blocks, by a loop of the test's own, past the hooks."""
    x, states = model.embed(x), []
    for block in getattr(model, model.name):
        x = model.unwrap(block.forward(x))
        states.append(x)
    return states


def by_hand(student, teacher):
    return -(F.normalize(student, dim=-1) * F.normalize(teacher.detach(), dim=-1)).sum(-1).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(gradients, expected, scale=1.0):
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6 * scale)


@pytest.fixture
def tokens():
    return torch.randn(3, 7, WIDTH)


def check_against_hand(model, sync, x, student=2, teacher=4, weight=0.2, **loss):
    states = hidden_states(copy.deepcopy(model), x)
    expected = weight * by_hand(states[student - 1], states[teacher - 1])
    reference = copy.deepcopy(model)
    states = hidden_states(reference, x)
    wanted = gradients(
        reference, states[-1].square().mean() + weight * by_hand(states[student - 1], states[teacher - 1])
    )
    output = model(x)
    aligned = sync.loss(**loss)
    got = gradients(model, output.square().mean() + aligned)
    torch.testing.assert_close(aligned, expected.detach(), rtol=1e-5, atol=1e-6, check_layout=False)
    assert_same(got, wanted)


# --- which block


@pytest.mark.parametrize("name", ["blocks", "layers", "transformer_blocks", "double_blocks"])
def test_blocks_are_counted_from_one_as_the_paper_does(name, tokens):
    model = Model(name=name)
    sync = LayerSync(model, student=2, teacher=4)
    assert f"{name}.1 (block 2 of 5) <- {name}.3 (block 4 of 5) x 0.2" in repr(sync)
    check_against_hand(model, sync, tokens)


@pytest.mark.parametrize("how", ["path", "module"])
def test_a_block_by_path_or_identity_is_the_same_block(how, tokens):
    model = Model()
    ends = ("blocks.1", "blocks.3") if how == "path" else (model.blocks[1], model.blocks[3])
    sync = LayerSync(model, *ends)
    assert sync.alignment.pairs == ((2, 4),)
    check_against_hand(model, sync, tokens)


def test_numbers_go_on_from_double_to_single_stream_blocks():
    model = nn.Module()
    model.single_transformer_blocks = nn.ModuleList(Block() for _ in range(3))
    model.transformer_blocks = nn.ModuleList(Block() for _ in range(2))
    sync = LayerSync(model, 2, 3)
    assert "transformer_blocks.1 (block 2 of 5) <- single_transformer_blocks.0 (block 3 of 5)" in repr(sync)


def test_the_shallowest_list_of_blocks_is_the_denoisers():
    model = Model()
    model.text_encoder = nn.Module()
    model.text_encoder.encoder = Model(name="layers")
    assert "blocks.1 (block 2 of 5)" in repr(LayerSync(model, 2, 4))


def test_two_lists_of_blocks_are_ambiguous_until_one_is_named():
    model = nn.Module()
    model.dit, model.encoder = Model(), Model(name="layers")
    with pytest.raises(
        ValueError, match=r"several lists of blocks: dit\.blocks, encoder\.layers.*blocks='dit\.blocks'"
    ):
        LayerSync(model, 2, 4)
    assert "dit.blocks.1 (block 2 of 5)" in repr(LayerSync(model, 2, 4, blocks="dit.blocks"))
    assert "dit.blocks.1 (block 2 of 5)" in repr(LayerSync(model, "dit.blocks.1", "dit.blocks.3", blocks="dit.blocks"))


def test_wrappers_leave_no_trace_in_names_and_the_outermost_module_gets_the_hook(tokens):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Model()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    wrapped = nn.Module()
    wrapped.module = model  # as DDP does
    sync = LayerSync(wrapped, 2, 4)
    assert "blocks.1 (block 2 of 5)" in repr(sync)
    assert len(model.blocks[1]._forward_hooks) == 1
    check_against_hand(model, sync, tokens)


def test_the_end_of_a_path_is_enough_where_it_is_unique():
    peft = nn.Module()
    peft.base_model = nn.Module()
    peft.base_model.model = Model()
    sync = LayerSync(peft, "blocks.1", "blocks.3")
    assert "base_model.model.blocks.1 (block 2 of 5)" in repr(sync)


def test_without_a_pair_the_default_of_the_depth():
    assert LayerSync(Model(depth=28)).alignment.pairs == ((8, 16),)


def test_a_resolved_pair_is_logged(caplog):
    with caplog.at_level(logging.INFO, "layersync_kernels"):
        LayerSync(Model(), 2, 4)
    assert "blocks.1 (block 2 of 5) <- blocks.3 (block 4 of 5)" in caplog.text


# --- where the tokens are


@dataclasses.dataclass
class Output:
    hidden_states: torch.Tensor
    attention: torch.Tensor


class Mapping(dict):
    pass


Streams = namedtuple("Streams", ["text", "img"])


def text_then_image(self, hidden_states, encoder_hidden_states):
    return encoder_hidden_states, hidden_states


@pytest.mark.parametrize(
    ("wrap", "unwrap", "options"),
    [
        (lambda x: x, lambda x: x, {}),
        (lambda x: (x,), lambda y: y[0], {}),
        (lambda x: (x, torch.ones(3, 2, 7, 7)), lambda y: y[0], {}),  # attention weights beside it
        (lambda x: (None, x), lambda y: y[1], {}),  # SD3's last block
        (lambda x: Output(x, torch.ones(3, 7, 7)), lambda y: y.hidden_states, {}),
        (lambda x: Mapping(last_hidden_state=x, pooled=torch.ones(3, WIDTH)), lambda y: y["last_hidden_state"], {}),
        (lambda x: Streams(torch.ones(3, 4, WIDTH), x), lambda y: y.img, {}),
        (lambda x: (torch.ones(3, 4, WIDTH), x), lambda y: y[1], {"output": 1}),
        (lambda x: (torch.ones(3, 4, WIDTH), x), lambda y: y[1], {"output": lambda y: y[-1]}),
        (lambda x: Mapping(a=torch.ones(3, 4, WIDTH), b=x), lambda y: y["b"], {"output": "b"}),
        (lambda x: Output(torch.ones(3, 7, WIDTH), x), lambda y: y.attention, {"output": "attention"}),
    ],
)
def test_hidden_tokens_are_found_in_what_a_block_returns(wrap, unwrap, options, tokens):
    model = Model(wrap=wrap, unwrap=unwrap)
    check_against_hand(model, LayerSync(model, 2, 4, **options), tokens)


def test_two_streams_are_told_apart_by_the_names_in_the_return_statement():
    class Dual(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden_states, encoder_hidden_states):
            hidden_states, encoder_hidden_states = self.image(hidden_states), self.text(encoder_hidden_states)
            return encoder_hidden_states, hidden_states

    model = nn.Module()
    model.transformer_blocks = nn.ModuleList(Dual() for _ in range(4))
    sync = LayerSync(model, 2, 3)
    image, text, images = torch.randn(2, 7, WIDTH), torch.randn(2, 7, WIDTH), []
    for block in model.transformer_blocks:
        text, image = block(image, text)
        images.append(image)
    torch.testing.assert_close(sync.loss(), 0.2 * by_hand(images[1], images[2]))


@pytest.mark.parametrize("inside", [None, "embeddings", "text_encoder"])
def test_a_class_token_is_told_once(inside, recwarn):
    """timm's stands beside the blocks, that of transformers in `embeddings`; another network's is none of ours."""
    model = Model()
    holder = model
    if inside is not None:
        holder = nn.Module()
        model.add_module(inside, holder)
    holder.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
    for tokens in (None, slice(None), slice(1, None)):
        LayerSync(model, 2, 4, tokens=tokens)
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (inside != "text_encoder")
    assert all("cls_token is aligned too; tokens=slice(1, None)" in text for text in said)


def test_two_streams_without_names_are_not_guessed_at(tokens):
    model = Model(wrap=lambda x: (torch.ones(3, 4, WIDTH), x), unwrap=lambda y: y[1])
    sync = LayerSync(model, 2, 4)
    model(tokens)
    with pytest.raises(ValueError, match=r"blocks\.1 returns tuple \(a torch\.float32 tensor \(3, 4, 16\).*output=1"):
        sync.loss()


def test_an_example_is_a_key_of_what_came(tokens):
    model = Model(wrap=lambda x: {"h": x, "skip": 2 * x}, unwrap=lambda y: y["h"])
    sync = LayerSync(model, 2, 4)
    model(tokens)
    with pytest.raises(ValueError, match="as in output='h'"):
        sync.loss()


@pytest.mark.parametrize(
    ("shape", "token_dim"), [((3, 7, WIDTH), 1), ((7, 3, WIDTH), 0), ((3, 4, 7, WIDTH), 1), ((21, WIDTH), 1)]
)
def test_token_layouts(shape, token_dim):
    model = Model()
    check_against_hand(model, LayerSync(model, 2, 4, token_dim=token_dim), torch.randn(shape))


@pytest.mark.parametrize("token_dim", [0, 1])
@pytest.mark.parametrize("masked", ["selected", "all"])
def test_a_mask_is_batch_first_and_cut_like_the_tokens(token_dim, masked, tokens):
    """Motion: tokens (1 + L, B, D) with a condition token in front, a padding mask (B, L)."""
    model = Model()
    sync = LayerSync(model, 2, 4, 1.0, token_dim=token_dim, tokens=slice(1, None))
    x = tokens.transpose(0, 1) if token_dim == 0 else tokens
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    states = [s.transpose(0, 1) if token_dim == 0 else s for s in hidden_states(model, x)]
    expected = layersync_loss(states[1][:, 1:], states[3][:, 1:], mask=mask[:, 1:])
    model(x)
    torch.testing.assert_close(sync.loss(mask=mask[:, 1:] if masked == "selected" else mask), expected)


PADDING = pytest.mark.parametrize("padding", [1.0, math.nan])


@PADDING
@pytest.mark.parametrize("backend", ["reference", mark("cpp"), mark("triton")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "teacher_grad"), [("hooks", False), ("hooks", True), ("reentrant", False)])
def test_a_padded_batch_is_the_mean_over_the_tokens_of_its_samples(padding, backend, dtype, mode, teacher_grad):
    """Values and gradients of both ends, in fp64 by hand from the samples alone; the task sees what is there, too."""
    device, lengths = device_of(backend), (7, 4, 2)
    mask = torch.arange(7, device=device) < torch.tensor(lengths, device=device)[:, None]
    ends = nn.ModuleDict({"student": nn.Identity(), "teacher": nn.Identity()})
    sync = LayerSync(ends, *ends, 0.5, mode=mode, teacher_grad=teacher_grad, backend=backend)
    samples = [[torch.randn(length, WIDTH, device=device).to(dtype) for length in lengths] for _ in ends]

    student, teacher = (torch.cat(side).double().requires_grad_() for side in samples)
    cosines = F.cosine_similarity(student, teacher if teacher_grad else teacher.detach(), dim=-1)
    (-0.5 * cosines.mean() + 0 * teacher.sum()).backward()

    padded = [nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=padding) for side in samples]
    leaves = [tokens.requires_grad_() for tokens in padded]
    outputs = [end(tokens) for end, tokens in zip(ends.values(), leaves, strict=True)]
    loss = sync.loss(mask=mask)
    (loss + sum(0 * output[mask].float().sum() for output in outputs)).backward()

    torch.testing.assert_close(loss.detach().double(), -0.5 * cosines.mean().detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sync.cosine["student:teacher"].double(), cosines.mean().detach(), rtol=1e-5, atol=1e-6)
    for tokens, own in zip(leaves, (student, teacher), strict=True):
        assert (tokens.grad[~mask] == 0).all()
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(tokens.grad[mask].double(), own.grad, rtol=max(ulp, 1e-5), atol=1e-7)


@PADDING
def test_what_blocks_make_of_padding_changes_no_weight(padding, tokens):
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    model, plain = Model(wrap=lambda x: torch.where(mask[..., None], x, padding)), Model()
    plain.load_state_dict(model.state_dict())
    sync = LayerSync(model, 1, 3)
    states = hidden_states(plain, tokens[mask])
    wanted = gradients(plain, 0.2 * by_hand(states[0], states[2]))
    model(tokens)
    assert_same(gradients(model, sync.loss(mask=mask)), wanted)


@pytest.mark.parametrize(("select", "student", "teacher"), [("tail", slice(-7, None), slice(None)),
                                                             ("head", slice(7), slice(None))])  # fmt: skip
def test_blocks_with_other_token_counts_are_aligned_at_an_end(select, student, teacher):
    """JiT prepends tokens from some block on; Flux concatenates text and image in its single-stream blocks."""
    model = Model()
    sync = LayerSync(model, 2, 4, 1.0, tokens=select)
    long, short = torch.randn(3, 9, WIDTH), torch.randn(3, 7, WIDTH)
    s, t = model.blocks[1](long), model.blocks[3](short)
    torch.testing.assert_close(sync.loss(), layersync_loss(s[:, student], t[:, teacher]))
    mask = torch.rand(3, 9) > 0.3
    s, t = model.blocks[1](long), model.blocks[3](short)
    torch.testing.assert_close(sync.loss(mask=mask), layersync_loss(s[:, student], t, mask=mask[:, student]))


def test_each_side_may_have_a_layout_of_its_own(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4, 1.0, tokens=(slice(2, None), lambda t: t[:, :5]), token_dim=(1, 0))
    s, t = model.blocks[1](tokens), model.blocks[3](tokens.transpose(0, 1))
    torch.testing.assert_close(sync.loss(), layersync_loss(s[:, 2:], t.transpose(0, 1)[:, :5]))


def test_packed_sequences_count_alike_with_weights_by_length():
    model = Model()
    sync = LayerSync(model, 2, 4, 1.0)
    lengths = torch.tensor([2, 7, 4])
    x = torch.randn(int(lengths.sum()), WIDTH)
    states = hidden_states(model, x)
    parts = zip(states[1].split(lengths.tolist()), states[3].split(lengths.tolist()), strict=True)
    expected = torch.stack([layersync_loss(s, t) for s, t in parts]).mean()
    model(x)
    torch.testing.assert_close(sync.loss(token_weight=(1 / lengths).repeat_interleave(lengths)), expected)


# --- the loss


def test_every_pair_counts_and_reports_its_cosine(tokens):
    model = Model()
    sync = LayerSync(model, pairs=[(1, 3), ("blocks.1", "blocks.3")], weight=[0.3, 0.5])
    states = hidden_states(model, tokens)
    first, second = by_hand(states[0], states[2]), by_hand(states[1], states[3])
    model(tokens)
    loss = sync.loss()
    torch.testing.assert_close(loss, 0.3 * first + 0.5 * second)
    assert not sync.value.requires_grad
    assert sync.value == loss.detach()
    assert set(sync.cosine) == {"1:3", "2:4"}
    torch.testing.assert_close(sync.cosine["2:4"], -second.detach())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_and_a_weight_by_noise_level(reduction, masked, tokens):
    model = Model()
    sync = LayerSync(model, 2, 4, 0.5)
    mask = torch.rand(3, 7) > 0.3 if masked else None
    weight = torch.rand(3, 1)
    states = hidden_states(model, tokens)
    expected = 0.5 * layersync_loss(states[1], states[3], mask=mask, token_weight=weight, reduction=reduction)
    mean = layersync_loss(states[1], states[3], mask=mask, token_weight=weight).detach()
    model(tokens)
    torch.testing.assert_close(sync.loss(mask, reduction, token_weight=weight), expected)
    torch.testing.assert_close(sync.cosine["2:4"], -mean)


def test_the_weight_changes_from_step_to_step(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4)
    model(tokens)
    before = sync.loss()
    sync.weight = 0.6
    assert sync.weight == 0.6
    model(tokens)
    torch.testing.assert_close(sync.loss(), 3 * before)


def test_skipped_steps_capture_nothing(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4, every=2, stop_step=4)
    assert sync.cosine["2:4"].isnan()  # as long as nothing has been aligned
    for step, active in enumerate([True, False, True, False, False, False]):
        sync.step, before = step, sync.cosine["2:4"]
        model(tokens)
        assert (sync._pairs[0].hidden is not None) == active
        assert (sync.loss() != 0) == active
        assert (sync.cosine["2:4"] is before) != active


def test_a_schedule_without_a_step_is_an_error(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4, every=2)
    model(tokens)
    with pytest.raises(ValueError, match=r"sync\.step = step"):
        sync.loss()
    sync.enabled = False
    assert sync.loss() == 0


def test_it_can_be_switched_off_and_on(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4)
    model(tokens)
    sync.enabled = False
    assert sync._pairs[0].hidden is None
    model(tokens)
    assert sync.loss() == 0
    sync.enabled = True
    check_against_hand(model, sync, tokens)


def test_it_is_a_module_without_parameters_that_does_not_own_the_model(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4)
    assert not list(sync.parameters())
    assert not sync.state_dict()
    model(tokens)
    assert sync() == sync.value


# --- life of the hooks


def test_the_model_is_untouched_and_removal_leaves_no_hook(tokens):
    model = Model()
    keys, repr_before = list(model.state_dict()), repr(model)
    sync = LayerSync(model, 2, 4)
    assert list(model.state_dict()) == keys
    assert repr(model) == repr_before
    sync.remove()
    assert not any(module._forward_hooks for module in model.modules())
    model(tokens)
    assert sync.loss() == 0


@pytest.mark.parametrize(
    ("mode", "reentrant"),
    [("hooks", None), ("hooks", False), ("reentrant", None), ("reentrant", False), ("reentrant", True)],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_kept_after_the_step(mode, reentrant, compiled, tokens):
    model = Model(reentrant=reentrant)
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    sync = LayerSync(model, 2, 4, mode=mode)
    for _ in range(2):
        with set_checkpoint_early_stop(False):  # a recomputation runs to the end of the block, and its hooks too
            output = model(tokens).square().mean()
        (output + (loss := sync.loss())).backward()
        assert sync._pairs[0].captured() == Captured()
    assert not loss.isnan()


@pytest.mark.parametrize("mode", ["hooks", "reentrant"])
def test_a_recomputation_without_the_loss_keeps_nothing(mode, tokens):
    model = Model(reentrant=False)
    sync = LayerSync(model, 2, 4, mode=mode)
    with set_checkpoint_early_stop(False):
        output = model(tokens).square().mean()
    sync.loss()
    output.backward()
    assert sync._pairs[0].captured() == Captured()


def test_hidden_states_die_with_the_step(tokens):
    model = Model()
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    sync = LayerSync(model, 2, 4)
    loss = model(tokens).square().mean() + sync.loss()
    assert seen[0]() is not None
    loss.backward()
    del loss
    gc.collect()
    assert seen[0]() is None


def test_a_forward_pass_between_loss_and_backward_is_kept(tokens):
    """The end of a backward pass forgets what checkpoints captured again in it, and nothing else."""
    model = Model()
    sync = LayerSync(model, 2, 4)
    first = model(tokens).square().mean() + sync.loss()
    second = model(tokens).square().mean()
    first.backward()
    torch.testing.assert_close(sync.loss(), second.new_tensor(0.2) * by_hand(*hidden_states(model, tokens)[1::2]))


def test_validation_without_grad_is_zero_and_sampling_in_between_does_no_harm(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4)
    with torch.no_grad():
        model(tokens)
        assert sync.loss() == 0
    with torch.no_grad():
        model(tokens)
    assert sync.loss() == 0
    model(tokens)
    with torch.no_grad():
        model(2 * tokens)
    torch.testing.assert_close(sync.loss(), 0.2 * by_hand(*hidden_states(model, tokens)[1::2]))


@pytest.mark.parametrize("copier", ["deepcopy", "torch.save"])
def test_copies_of_the_model_carry_no_activations_and_do_not_disturb(copier, tokens):
    model = Model(wrap=(identity := torch.nn.Identity()), unwrap=identity)
    sync = LayerSync(model, 2, 4)
    output = model(tokens)
    if copier == "deepcopy":
        ema = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        ema = torch.load(file, weights_only=False)
    ema(2 * tokens).sum().backward()
    states = hidden_states(ema, tokens)
    loss = sync.loss()
    torch.testing.assert_close(loss, 0.2 * by_hand(states[1], states[3]))
    (output.sum() + loss).backward()
    fresh = LayerSync(ema, 2, 4)  # training can go on from the copy
    check_against_hand(ema, fresh, tokens)


def test_a_copy_of_layersync_itself_says_that_it_has_no_hooks(tokens):
    holder = nn.Module()
    holder.model = Model()
    holder.sync = LayerSync(holder.model, 2, 4)
    twin = copy.deepcopy(holder)
    twin.model(tokens)
    with pytest.raises(RuntimeError, match="this is a copy, without hooks"):
        twin.sync.loss()


def test_switching_off_and_on_recompiles_once_and_validation_once(tokens):
    model = Model()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    sync = LayerSync(model, 2, 4)

    def step():
        loss = model(tokens).square().mean() + sync.loss()
        loss.backward()

    step()
    for weight in (0.1, 0.5):
        sync.weight = weight
        step()
    assert counter.frame_count == 1
    for _ in range(2):
        sync.enabled = False
        step()
        sync.enabled = True
        step()
        with torch.no_grad():
            model(tokens)
    assert counter.frame_count == 3


@pytest.mark.parametrize("mode", ["hooks", "reentrant"])
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_checkpoints_inside_of_a_fully_compiled_model(mode, tokens):
    model = Model(reentrant=False)
    plain = copy.deepcopy(model)
    model.compile(backend="aot_eager", fullgraph=True)
    sync = LayerSync(model, 2, 4, mode=mode)
    for _ in range(2):
        states = hidden_states(plain, tokens)
        wanted = gradients(plain, states[-1].square().mean() + 0.2 * by_hand(states[1], states[3]))
        got = gradients(model, model(tokens).square().mean() + sync.loss())
        assert_same(got, wanted)


@pytest.mark.parametrize("mode", ["hooks", "reentrant"])
def test_a_compiled_training_step(mode, tokens):
    model = Model()
    plain = copy.deepcopy(model)
    sync = LayerSync(model, 2, 4, mode=mode)
    step = torch.compile(
        lambda x: model(x).square().mean() + sync.loss(), backend="aot_eager", fullgraph=mode == "hooks"
    )
    for _ in range(2):
        states = hidden_states(plain, tokens)
        wanted = gradients(plain, states[-1].square().mean() + 0.2 * by_hand(states[1], states[3]))
        got = gradients(model, step(tokens))
        assert_same(got, wanted)
        torch.testing.assert_close(sync.cosine["2:4"], -by_hand(states[1], states[3]).detach())


# --- reentrant mode


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("mode", "reentrant"),
    [("hooks", None), ("hooks", False), ("reentrant", None), ("reentrant", False), ("reentrant", True)],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_both_modes_give_the_same_gradients(mode, reentrant, compiled, device, tokens):
    model, tokens = Model(reentrant=reentrant).to(device), tokens.to(device)
    plain = copy.deepcopy(model)
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    sync = LayerSync(model, pairs=[(2, 4), (2, 3)], weight=[0.3, 0.5], mode=mode, tokens=slice(1, None))
    for scale in (1.0, 1024.0):
        states = [state[:, 1:] for state in hidden_states(plain, tokens)]
        aligned = 0.3 * by_hand(states[1], states[3]) + 0.5 * by_hand(states[1], states[2])
        wanted = gradients(plain, (plain(tokens).square().mean() + aligned) * scale)
        output, loss = model(tokens).square().mean(), sync.loss()
        got = gradients(model, (output + loss) * scale)
        torch.testing.assert_close(loss.detach(), aligned.detach(), rtol=1e-5, atol=1e-6)
        assert_same(got, wanted, scale)


def test_reentrant_mode_does_not_underflow_in_half_precision():
    model = Model().half()
    tokens = 1000 * torch.randn(8, 64, WIDTH, dtype=torch.half)  # unscaled, their gradients are below the least half
    both = []
    for mode in ("hooks", "reentrant"):
        sync = LayerSync(model, 2, 4, mode=mode)
        both.append(gradients(model, 1024 * (0 * model(tokens).float().sum() + sync.loss())))
        sync.remove()
    wanted, got = both
    assert wanted["blocks.1.fc1.weight"].abs().max() > 0
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))


def test_a_reentrant_loss_on_its_own_is_an_error_and_left_out_adds_nothing(tokens):
    model = Model(reentrant=True)
    sync = LayerSync(model, 2, 4, mode="reentrant")
    model(tokens)
    with pytest.raises(RuntimeError, match="backpropagate loss\\(\\) together with the task's loss"):
        sync.loss().backward()
    output = model(tokens).square().mean()
    sync.loss()
    got = gradients(model, output)
    wanted = gradients(model, model(tokens).square().mean())
    assert_same(got, wanted)


def test_two_reentrant_losses_in_one_backward_pass_are_an_error(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4, mode="reentrant")
    total = model(tokens).mean() + sync.loss() + model(tokens).mean() + sync.loss()
    with pytest.raises(RuntimeError, match="takes one loss\\(\\) in a backward pass"):
        total.backward()


def test_the_old_name_of_reentrant_mode_is_still_taken():
    assert LayerSync(Model(), 2, 4, mode="tap").mode == "reentrant"


# --- projector


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("by_path", [False, True])
def test_a_projector_in_the_model_trains_with_it(reentrant, by_path, tokens):
    model = Model(reentrant=reentrant)
    model.projector = nn.Linear(WIDTH, WIDTH)
    reference = copy.deepcopy(model)
    sync = LayerSync(model, 2, 4, projector="projector" if by_path else model.projector)
    states = hidden_states(reference, tokens)
    wanted = gradients(reference, states[-1].square().mean() + 0.2 * by_hand(reference.projector(states[1]), states[3]))
    got = gradients(model, model(tokens).square().mean() + sync.loss())
    assert wanted.keys() == got.keys() >= {"projector.weight"}
    assert_same(got, wanted)


def test_the_models_output_leads_to_the_projector_for_ddp(tokens):
    """DDP with find_unused_parameters looks for parameters from the output; those it does not find are ready twice."""
    model = Model()
    model.projector = nn.Linear(WIDTH, WIDTH)
    LayerSync(model, 2, 4, projector="projector")
    output = model(tokens)
    nodes, found = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        found.add(getattr(node, "variable", None))
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert model.projector.weight in found


# --- accidents


def test_attached_after_the_first_compiled_call_says_so(tokens):
    model = Model()
    model.compile(backend="aot_eager")
    model(tokens)
    sync = LayerSync(model, 2, 4)
    model(tokens)
    with pytest.raises(RuntimeError, match=r"nothing was captured at blocks\.1 .*compiled model, which ignores later"):
        sync.loss()


def test_a_loss_without_a_forward_pass_says_so(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        sync.loss()
    model(tokens)
    sync.loss()
    with pytest.raises(RuntimeError, match="once after each forward pass"):
        sync.loss()
    assert sync.value is None


def test_a_reentrant_checkpoint_is_recognised(tokens):
    model = Model(reentrant=True)
    sync = LayerSync(model, 2, 4)
    model(tokens)
    with pytest.raises(RuntimeError, match=r"use_reentrant=False\), or LayerSync\(\.\.\., mode='reentrant'\)"):
        sync.loss()


def test_a_pass_that_stops_early_leaves_no_stale_teacher(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4)
    model(tokens)
    model.blocks[1](2 * tokens)
    with pytest.raises(RuntimeError, match=r"student blocks\.1 .* ran in the last forward pass, and teacher blocks\.3"):
        sync.loss()


def test_a_teacher_that_runs_first_is_an_error_even_where_names_say_nothing(tokens):
    model = nn.Module()
    model.late, model.early = Block(), Block()
    sync = LayerSync(model, "late", "early")
    model.late(model.early(tokens))
    with pytest.raises(RuntimeError, match="the teacher comes before the student"):
        sync.loss()


def test_two_forward_passes_before_one_loss_are_reported_once(tokens):
    model = Model()
    sync = LayerSync(model, 2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(tokens)
            model(2 * tokens)
            loss = sync.loss()
    assert ["two forward passes" in str(w.message) for w in caught] == [True]
    assert caught[0].filename == __file__
    torch.testing.assert_close(loss, 0.2 * by_hand(*hidden_states(model, 2 * tokens)[1::2]))


def test_a_student_that_nothing_trains_is_reported(tokens):
    model = Model()
    model.requires_grad_(False)
    model.blocks[3].requires_grad_(True)
    sync = LayerSync(model, 2, 4)
    model(tokens)
    with pytest.warns(UserWarning, match=r"nothing up to student blocks\.1 \(block 2 of 5\) is trained"):
        sync.loss()


def test_a_teacher_among_the_last_blocks_is_reported():
    with pytest.warns(
        UserWarning, match=r"blocks\.9 \(block 10 of 10\) is among the last fifth.*up to block 8"
    ) as caught:
        LayerSync(Model(depth=10), 3, 10)
    with pytest.warns(UserWarning, match="last fifth"):
        LayerSync(Model(depth=10), 3, 9)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LayerSync(Model(depth=10), 3, 8)


def test_our_own_fused_blocks_are_sent_to_capture():
    model = nn.Module()
    model.blocks = nn.ModuleList(AdaLNZeroBlock(WIDTH, 2) for _ in range(4))
    sync = LayerSync(model, 1, 2)
    stream = Stream(torch.randn(2, 3, WIDTH))
    for block in model.blocks:
        stream, *_ = block(stream, torch.randn(2, WIDTH))
    with pytest.raises(ValueError, match="hands back hidden states itself"):
        sync.loss()


@pytest.mark.parametrize(
    ("wrap", "unwrap", "match"),
    [
        (lambda x: {"x": x.sum()}, lambda y: torch.ones(3, 7, WIDTH) * y["x"], "no hidden tokens"),
        (lambda x: (x.long(),), lambda y: y[0].float(), "no hidden tokens"),
    ],
)
def test_a_block_that_returns_no_tokens_says_what_it_returns(wrap, unwrap, match, tokens):
    model = Model(wrap=wrap, unwrap=unwrap)
    sync = LayerSync(model, 2, 4)
    model(tokens)
    with pytest.raises(TypeError, match=match):
        sync.loss()


def test_token_counts_and_widths_that_differ_are_explained(tokens):
    model = nn.Module()
    model.a, model.b = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
    model.c = nn.Linear(WIDTH, 12)
    sync = LayerSync(model, "a", "b")
    model.a(tokens), model.b(tokens[:, 1:])
    with pytest.raises(ValueError, match=r"\(3, 7, 8\), the teacher's \(3, 6, 8\).*tokens='tail' or 'head'"):
        sync.loss()
    sync = LayerSync(model, "a", "c")
    model.a(tokens), model.c(tokens)
    with pytest.raises(ValueError, match="8 channels and the teacher 12; give a projector"):
        sync.loss()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((4, 4), {}, ValueError, "both block 4"),
        ((4, 2), {}, ValueError, r"did you mean \(2, 4\)"),
        (("blocks.3", "blocks.1"), {}, ValueError, r"did you mean \(2, 4\)"),
        ((0, 4), {}, ValueError, r"no block 0; Model has blocks 1 \(blocks\.0\) to 5 \(blocks\.4\), counted from 1"),
        ((2, 6), {}, ValueError, "no block 6"),
        ((2,), {}, ValueError, "give both student and teacher"),
        ((2, 4), {"pairs": [(1, 2)]}, ValueError, "not both"),
        ((), {"pairs": [3]}, TypeError, r"expected \(student, teacher\) tuples"),
        (("blocks.7", "blocks.9"), {}, ValueError, r"no module 'blocks\.7'; blocks were found at blocks\.0, blocks\.4"),
        ((2, 4.0), {}, TypeError, "got float"),
        ((2, Block()), {}, ValueError, "not a submodule"),
        ((2, 4), {"mode": "hook"}, ValueError, "unknown mode='hook'"),
        ((2, 4), {"mode": "reentrant", "projector": "embed"}, ValueError, "mode='reentrant' has no projector"),
        ((2, 4), {"projector": nn.Linear(2, 2)}, ValueError, r"not part of the model.*do model\.projector = projector"),
        ((2, 4), {"projector": 3}, TypeError, "a module or its path, got int"),
        ((2, 4), {"tokens": 1}, TypeError, r"tokens=1; .*slice\(1, None\)"),
        ((2, 4), {"tokens": ("tail", None)}, ValueError, "are for both sides"),
        ((2, 4), {"output": 1.5}, TypeError, "output=1.5"),
        ((2, 4), {"output": (0, 1, 2)}, ValueError, "a tuple holds"),
        ((2, 4), {"token_dim": "first"}, TypeError, "token_dim='first'"),
        ((2, 4), {"weight": [1, 2]}, ValueError, "2 weights for 1 pairs"),
    ],
)
def test_bad_arguments_are_explained(arguments, options, error, match):
    with pytest.raises(error, match=match):
        LayerSync(Model(), *arguments, **options)


def test_a_model_whose_blocks_are_not_found_asks_for_paths():
    with pytest.raises(ValueError, match=r"cannot number the blocks of Sequential: no list of blocks.*blocks='dit"):
        LayerSync(nn.Sequential(Block(), Block()), 1, 2)
    with pytest.raises(ValueError, match="DataParallel"):
        LayerSync(nn.DataParallel(Model()), 2, 4)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        LayerSync([Block()], 1, 2)
