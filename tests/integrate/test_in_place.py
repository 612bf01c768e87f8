"""`LayerSync` and ops in place: a block's output that changes after the block makes no wrong loss."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from layersync_kernels import LayerSync

from .test_sync import WIDTH, Block, assert_same, by_hand, gradients


class Model(nn.Module):
    """Its trainer's author writes `change(x)` behind a block (counted from 1)."""

    def __init__(self, change, behind=2, kind=Block, run=lambda block, x: block(x), **options):
        super().__init__()
        self.change, self.behind, self.run = change, behind, run
        self.blocks = nn.ModuleList(kind(**options) for _ in range(5))
        self.embed = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.embed(x)
        for number, block in enumerate(self.blocks, start=1):
            x = self.run(block, x)
            if number == self.behind:
                x = self.change(x)
        return x


def add(x):
    x += 1
    return x


def part(x):
    x[:, 0] = 0
    return x


def through_a_view(x):
    x.transpose(0, 1).mul_(2)
    return x


def without_grad(x):
    with torch.no_grad():
        x.mul_(2)
    return x


CHANGES = {"+=": add, "relu_": torch.relu_, "part": part, "view": through_a_view}
OUT_OF_PLACE = {"none": lambda x: x, "+": lambda x: x + 1, "clone": lambda x: x.clone().relu_()}
RUNS = {
    "eager": lambda block, x: block(x),
    "checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=False),
}


@pytest.fixture
def tokens():
    return torch.randn(3, 7, WIDTH)


def compiled(model, backend="aot_eager"):
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    return model


def refuses(sync, role, number):
    path = f"{role} blocks\\.{number - 1} \\(block {number} of 5\\) returned was changed in place"
    return pytest.raises(RuntimeError, match=f"{path}.*x = x \\+ y.*x\\.clone\\(\\)")


@pytest.mark.parametrize(("role", "number"), [("student", 2), ("teacher", 4)])
@pytest.mark.parametrize("run", [*RUNS, "compiled"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_block_is_an_error(change, run, role, number, tokens):
    model = Model(CHANGES[change], number, run=RUNS.get(run, RUNS["eager"]))
    if run == "compiled":
        compiled(model)
    sync = LayerSync(model, 2, 4)
    for _ in range(2):
        model(tokens)
        with refuses(sync, role, number):
            sync.loss()
    assert sync.value is None
    model.change = OUT_OF_PLACE["+"]
    model(tokens)
    assert sync.loss().isfinite(), "the error is over with the step"


def test_a_change_that_autograd_does_not_see_is_an_error(tokens):
    model = Model(without_grad)
    sync = LayerSync(model, 2, 4)
    model(tokens)
    with refuses(sync, "student", 2):
        sync.loss()


class Tail(Block):
    """Changes its input, which is the output of the block before."""

    def forward(self, x):
        return x.add_(self.fc2(self.fc1(x.clone()).tanh()))


def test_a_later_block_that_changes_its_input_is_an_error(tokens):
    model = Model(OUT_OF_PLACE["none"])
    model.blocks[2] = Tail()
    sync = LayerSync(model, 2, 4)
    model(tokens)
    with refuses(sync, "student", 2):
        sync.loss()


class Dropping(Block):
    """In place, before it returns."""

    def forward(self, x):
        torch.manual_seed(0)
        return F.dropout(super().forward(x), 0.5, self.training, inplace=True)


def assert_as_by_hand(model, sync, tokens, autocast=False):
    """The copy's blocks are called past the hooks, and what they return is cloned at once."""
    twin, kept = copy.deepcopy(model), []

    def run(block, x):
        y = block.forward(x)
        kept.append(y.clone())
        return y

    twin.run = run
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted_output, output = twin(tokens), model(tokens)
    aligned, expected = sync.loss(), 0.2 * by_hand(kept[1].float(), kept[3].float())
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(aligned, expected, **tolerance)
    if not autocast:
        assert_same(
            gradients(model, output.square().mean() + aligned),
            gradients(twin, wanted_output.square().mean() + expected),
        )


@pytest.mark.parametrize(
    ("kind", "run"),
    [(Block, run) for run in (*RUNS, "compiled", "compiled by Dynamo alone", "autocast")]
    + [(Dropping, run) for run in (*RUNS, "autocast")],  # compiled, random numbers are others
)
@pytest.mark.parametrize("change", OUT_OF_PLACE)
def test_no_alarm_where_nothing_changes_after_the_block(change, run, kind, tokens):
    model = Model(OUT_OF_PLACE[change], kind=kind, run=RUNS.get(run, RUNS["eager"]))
    sync = LayerSync(model, 2, 4)
    if run.startswith("compiled"):
        compiled(model, "eager" if "Dynamo" in run else "aot_eager")
    for _ in range(2):
        assert_as_by_hand(model, sync, tokens, autocast=run == "autocast")


class InPlaceRelu(Block):
    def forward(self, x):
        return F.relu(super().forward(x), inplace=True)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("last", [InPlaceRelu, Tail])
def test_no_alarm_for_compiled_blocks_that_work_in_place(last, backend, tokens):
    """The teacher changes its input, which is no student's output, and returns it."""
    model = Model(OUT_OF_PLACE["none"])
    model.blocks[1], model.blocks[3] = InPlaceRelu(), last()
    sync = LayerSync(compiled(model, backend), 2, 4)
    for _ in range(2):
        assert_as_by_hand(model, sync, tokens)


# ---- what blocks return


@dataclasses.dataclass
class Output:
    hidden_states: torch.Tensor
    logits: torch.Tensor


def other(x):
    return torch.ones(x.shape[0], 4, WIDTH)


LAYOUTS = {
    "tuple": (lambda x: (other(x), x), lambda y: (y[1], y[0]), {"output": 1}),
    "mapping": (lambda x: {"a": other(x), "b": x}, lambda y: (y["b"], y["a"]), {"output": "b"}),
    "dataclass": (lambda x: Output(x, other(x)), lambda y: (y.hidden_states, y.logits), {}),
    "nested": (lambda x: ((x, other(x)), None), lambda y: y[0], {"output": lambda y: y[0][0]}),
    "view": (lambda x: (other(x), x), lambda y: (y[1], y[0]), {"output": lambda y: y[1][:, 1:]}),
    "computed": (lambda x: (x,), lambda y: (y[0], None), {"output": lambda y: 2 * y[0]}),
    "view of a view": (lambda x: x[:, :, :], lambda y: (y, None), {"output": lambda y: y[:, 1:]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tensor_that_is_aligned_is_the_one_that_counts(layout, tokens):
    wrap, parts, options = LAYOUTS[layout]

    def change(which):
        def changed(y):
            tensor = parts(y)[which]
            if tensor is not None:
                tensor.add_(1)
            return y

        return changed

    model = Model(change(0), run=lambda block, x: block(x if isinstance(x, torch.Tensor) else parts(x)[0]), wrap=wrap)
    sync = LayerSync(model, 2, 4, **options)
    model(tokens)
    with refuses(sync, "student", 2):
        sync.loss()
    model.change = change(1)  # the other stream
    model(tokens)
    assert sync.loss().isfinite()


def test_with_a_projector_autograd_itself_says_so(tokens):
    """Nobody else has what the projector returned; its input and the teacher's output are autograd's to guard."""
    model = Model(add)
    model.projector = nn.Linear(WIDTH, WIDTH)
    sync = LayerSync(model, 2, 4, projector="projector")
    output = model(tokens)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output.sum() + sync.loss()).backward()
    model.behind = 4
    with pytest.raises(RuntimeError, match="modified inplace"):
        model(tokens)


# ---- reentrant mode


@pytest.mark.parametrize(("role", "number"), [("student", 2), ("teacher", 4)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_reentrant_checkpoint_is_an_error(change, role, number, tokens):
    model = Model(CHANGES[change], number, run=lambda block, x: checkpoint(block, x, use_reentrant=True))
    sync = LayerSync(model, 2, 4, mode="reentrant")
    model(tokens)
    with refuses(sync, role, number):
        sync.loss()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_reentrant_mode_without_a_checkpoint_is_an_error(change, tokens):
    """Of the student's output by autograd, at the line that does it; of the teacher's by `loss`."""
    model = Model(CHANGES[change])
    sync = LayerSync(model, 2, 4, mode="reentrant")
    with pytest.raises(RuntimeError, match="modified inplace"):
        model(tokens)
    model.behind = 4
    model(tokens)
    with refuses(sync, "teacher", 4):
        sync.loss()


@pytest.mark.parametrize("kind", [Block, Dropping])
def test_no_alarm_in_reentrant_mode(kind, tokens):
    model = Model(OUT_OF_PLACE["clone"], kind=kind, run=lambda block, x: checkpoint(block, x, use_reentrant=True))
    sync = LayerSync(model, 2, 4, mode="reentrant")
    for _ in range(2):
        assert_as_by_hand(model, sync, tokens)
