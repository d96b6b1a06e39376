"""What must hold for every family of video transformers that is supported in full.

A :class:`Case` describes a tiny model as a reader of its source would: which linear layers become
4 bit, whose tokens they see, in which order. Nothing in it is taken from the layout. The truth
about the tokens comes from the model itself: it runs with attention that mixes nothing, so that a
change of a video token or of the text shows in exactly the rows that belong to it.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import diffusers_hook
from diffusers_hook.layers import dialect
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.layers.fp8 import Fp8Linear
from diffusers_hook.layouts import Layout, layout_for
from diffusers_hook.tokens import ops, refresh
from tests.video.support.full_attention import full_attention, full_logits

VIDEO, JOINT, TEXT, CONTEXT = "video", "joint", "text", "context"

_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A tiny model of a family and what is known about it.

    Attributes:
        name: what the test is called.
        build: makes the model; the same weights in every call.
        arguments: batch -> the arguments of one call, by name.
        streams: linear layer that becomes 4 bit -> whose tokens its input's rows are.
        kept: linear layers that stay in 16 bit.
        modulation: linear layers of adaLN modulation, which may become FP8.
        attentions: the attentions that salient tokens are read from, in the order they run.
        grid: (frames, rows, columns) of the video tokens.
        touch_video: (arguments of one sample, (t, h, w)) -> the same with that token changed.
        touch_text: arguments of one sample -> the same with every text token changed.
        block_size: elements per block.
        output: the model's answer -> the video in it.
        one_by_one: whether attention runs once for every sample.
        beside: tokens of other videos that stand in the sequence beside these.
        last: a linear layer that runs after every attention; default: the last of `streams`.
        timestep: name of the argument with the noise level.
        later: what a later step's timestep is multiplied with.
    """

    name: str
    build: Callable[[], nn.Module]
    arguments: Callable[[int], dict]
    streams: Mapping[str, str]
    kept: tuple[str, ...]
    attentions: tuple[str, ...]
    grid: tuple[int, int, int]
    touch_video: Callable[[dict, tuple[int, int, int]], dict]
    touch_text: Callable[[dict], dict] = None
    modulation: tuple[str, ...] = ()
    block_size: int = 32
    output: Callable[[object], torch.Tensor] = lambda answer: answer[0]
    one_by_one: bool = False
    beside: int = 0
    last: str | None = None
    timestep: str = "timestep"
    later: float = 0.5

    def __repr__(self):
        return self.name

    @property
    def options(self):
        """Options of every enable()."""
        return {
            "progress": False,
            "block_size": self.block_size,
            "modulation": "16bit",
            "seda": True,
        }

    @torch.no_grad()
    def run(self, model, arguments=None, batch=2, context=None, noise=1.0):
        """The video that one call gives; `noise` scales the timestep."""
        arguments = dict(self.arguments(batch) if arguments is None else arguments)
        arguments[self.timestep] = (arguments[self.timestep] * noise).to(
            arguments[self.timestep].dtype
        )
        with nullcontext() if context is None else model.cache_context(context):
            return self.output(model(**arguments, return_dict=False))


def spread(path, count, streams):
    """{"attn.to_q": VIDEO} -> {"blocks.0.attn.to_q": VIDEO, "blocks.1.attn.to_q": VIDEO}."""
    return {f"{path}.{i}.{name}": s for i in range(count) for name, s in streams.items()}


def touch_latents(argument="hidden_states", patch=(1, 2, 2), time=2):
    """Change the pixels of one token of a 5-D input whose frames are axis `time`."""

    def touch(arguments, token):
        video = arguments[argument].clone()
        place = tuple(slice(i * p, (i + 1) * p) for i, p in zip(token, patch, strict=True))
        before = (slice(None), place[0]) if time == 1 else (slice(None), slice(None), place[0])
        index = (*before, ..., *place[1:])
        video[index] = _noise(video[index])
        return {**arguments, argument: video}

    return touch


def touch_argument(*names):
    """Change everything in the arguments of these names."""

    def touch(arguments):
        return {**arguments, **{name: _noise(arguments[name]) for name in names}}

    return touch


def _noise(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)


class Watch(TorchFunctionMode):
    """Sees the attention and the inputs of linear layers of a model, without the hook.

    Attributes:
        attention: (name of the attention, queries, keys, mask, scale) of every call inside one of
            the watched attentions; queries and keys are [rows, heads, tokens, head dim].
        inputs: linear layer's name -> the rows it got, [rows, K], one entry per call.
    """

    def __init__(self, model, attentions, linears=(), mixing=True):
        super().__init__()
        self.model, self.mixing = model, mixing
        self.names = attentions, linears
        self.attention, self.inputs = [], {name: [] for name in linears}
        self._inside = []

    def __enter__(self):
        self._handles = []
        for name in self.names[0]:
            module = self.model.get_submodule(name)
            enter, leave = self._entering(name), self._leaving
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave))
        for name in self.names[1]:
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._input_of(name)))
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(_SDPA, args, strict=False)), **kwargs}
        query, key, value = given["query"], given["key"], given["value"]
        if self._inside:
            assert not given.get("is_causal")
            seen = (query, key, given.get("attn_mask"), given.get("scale"))
            self.attention.append((self._inside[-1], *seen))
        if self.mixing:
            return func(*args, **kwargs)
        if query.shape[2] != key.shape[2]:  # attention to something else
            return query
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    def _entering(self, name):
        return lambda module, args: self._inside.append(name)

    def _leaving(self, module, args, output):
        self._inside.pop()

    def _input_of(self, name):
        return lambda module, args: self.inputs[name].append(args[0].flatten(0, -2))


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of one sample stand among the rows of a linear layer or the keys.

    Attributes:
        count: rows.
        video: int64 [video tokens in grid order], the row of each, or None if none has one.
        copies: rows of every video token.
        text: int64 [text tokens], ascending.
    """

    count: int
    video: torch.Tensor | None
    copies: int
    text: torch.Tensor


@functools.cache
def places(case):
    """(linear layer -> Places, attention -> Places of its keys), found by changing the input.

    The tokens are numbered from 1. For every binary digit the tokens that have it are changed, and
    then those that lack it: the rows that change spell out their token's number, and a row that
    depends on two tokens changes both times.
    """
    model, arguments = case.build(), case.arguments(1)
    base = _unmixed(case, model, arguments)
    tokens = list(itertools.product(*map(range, case.grid)))
    numbers = {name: torch.zeros(len(rows), dtype=torch.int64) for name, rows in base.items()}
    for digit in range(len(tokens).bit_length()):
        moved = []
        for wanted in (1, 0):
            changed = arguments
            for number, token in enumerate(tokens, 1):
                if number >> digit & 1 == wanted:
                    changed = case.touch_video(changed, token)
            moved.append(_moved(base, _unmixed(case, model, changed)))
        for name, rows in numbers.items():
            have, lack = (found[name] for found in moved)
            assert not (have & lack).any(), f"{name}: a row depends on several video tokens"
            rows += have.long() << digit
    text = base
    if case.touch_text is not None:
        text = _unmixed(case, model, case.touch_text(arguments))
    of_text = _moved(base, text)
    found = {}
    for name, rows in numbers.items():
        of_video, copies = _row_of_each(name, rows, len(tokens))
        found[name] = Places(len(rows), of_video, copies, of_text[name].nonzero()[:, 0])
    keys = {name: found.pop(f"keys of {name}") for name in case.attentions}
    return found, keys


@torch.no_grad()
def _unmixed(case, model, arguments):
    """The inputs of linear layers and the keys, as rows, where no token sees another."""
    with Watch(model, case.attentions, case.streams, mixing=False) as watch:
        case.run(model, arguments)
    rows = {name: torch.cat(inputs) for name, inputs in watch.inputs.items()}
    for name, _, key, *_ in watch.attention:
        assert f"keys of {name}" not in rows, f"{name} attends twice"
        rows[f"keys of {name}"] = key.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows


def _moved(before, after):
    """Which rows changed, by name."""
    return {name: (rows != after[name]).any(dim=1) for name, rows in before.items()}


def _row_of_each(name, numbers, tokens):
    """The first row of each video token, None where no row depends on one; and rows of each."""
    rows = numbers.nonzero()[:, 0]
    if not len(rows):
        return None, 0
    order = rows[numbers[rows].argsort(stable=True)]
    copies = len(order) // tokens
    expected = torch.arange(1, tokens + 1).repeat_interleave(copies)
    assert torch.equal(numbers[order], expected), f"{name}: {numbers}"
    return order[::copies], copies


def check_names(case):
    """The layers that are quantized, and those that are not, by name; and their streams."""
    model = case.build()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert names == {*case.streams, *case.kept, *case.modulation}
    diffusers_hook.enable(model, **{**case.options, "modulation": "fp8"})
    streams = {n: m.stream for n, m in model.named_modules() if isinstance(m, DialectLinear)}
    assert streams == dict(case.streams)
    fp8 = {n for n, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert fp8 == set(case.modulation)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in case.kept)


def check_streams(case):
    """What the model itself says about whose tokens the rows of every layer are."""
    tokens = int(np.prod(case.grid))
    for name, found in places(case)[0].items():
        stream = case.streams[name]
        if stream == CONTEXT:
            assert found.video is None, name
            continue
        others = found.count - tokens * found.copies - len(found.text)
        assert others in ({0, case.beside} if stream == VIDEO else {case.beside * found.copies}), (
            name
        )
        assert (found.video is not None) == (stream in (VIDEO, JOINT)), name
        if stream == VIDEO:
            assert found.copies == 1, name
            assert not len(found.text), name
        if stream == JOINT:
            # without text there is another video in its place
            assert len(found.text) > 0 or found.copies == 2, name


def check_scores(case):
    """The scores are those of the full attention map of the model without the hook.

    One layer is quantized, the last: everything the attention sees is what it was.
    """
    model = case.build()
    with Watch(model, case.attentions) as watch:
        case.run(model)
    last = (case.last or list(case.streams)[-1]).replace(".", r"\.")
    diffusers_hook.enable(model, **case.options, ignore=[f"re:(?!{last}$)"])
    with _spy(refresh, "select_salient") as chosen, _spy(refresh, "assign_groups") as grouped:
        case.run(model)
    expected = _scores_in_row_order(case, watch)
    assert len(chosen) == len(expected) == len(case.attentions)
    for (arguments, _), scores in zip(chosen, expected, strict=True):
        torch.testing.assert_close(arguments["scores"].double(), scores, rtol=1e-4, atol=1e-8)
    for (arguments, _), name in zip(_by_attention(case, grouped), case.attentions, strict=True):
        assert tuple(arguments["grid"]) == case.grid
        _check_keys(arguments, places(case)[1][name])


def _by_attention(case, grouped):
    """The calls of SeDA, one for each attention; those of its samples are put together."""
    each = len(grouped) // len(case.attentions)
    assert each == 1 or case.one_by_one
    starts = range(0, len(grouped), each)
    return [
        (grouped[i][0], torch.cat([result for _, result in grouped[i : i + each]])) for i in starts
    ]


def _check_keys(arguments, keys):
    """SeDA was told where each token, in grid order, stands among the keys."""
    positions, parts = arguments["video_positions"], arguments["parts"]
    if positions is None:
        positions = torch.arange(len(keys.video))
    if parts is not None:
        positions = positions + parts * arguments["attention"].key.shape[2]
    assert torch.equal(positions, keys.video)


def check_rows(case, layout: Layout | None = None, batch=2, context=None):
    """Every layer gets the rows of the salient tokens and of all text, and the groups, in place.

    Args:
        case: the case.
        layout: a layout other than the model's own, for showing that this check can fail.
        batch: samples of the call.
        context: name of the guidance branch.
    """
    model = case.build()
    diffusers_hook.enable(model, **case.options, layout=layout, salient_fraction=0.3)
    first, watch, grouped = _handed(case, model, batch, context, 1.0)
    chosen = _chosen_tokens(case, watch, 0.3)
    by_attention = zip(_by_attention(case, grouped), case.attentions, strict=True)
    groups = {name: result for (_, result), name in by_attention}
    second, _, _ = _handed(case, model, batch, context, case.later)
    found, _ = places(case)
    for name in case.streams:
        attention = _attention_of(case, name)
        tokens = chosen[attention] if attention else None
        expected = _expected_rows(case, name, found[name], tokens, batch)
        _check_salient(name, second[name], expected)
        if attention not in first[name].after:
            expected = _expected_rows(case, name, found[name], None, batch)
        _check_salient(name, first[name], expected)
        if attention and case.streams[name] in (VIDEO, JOINT):
            _check_groups(name, second[name].group, groups[attention], found[name])
    assert any(seen.group is not None and (seen.group >= 0).any() for seen in second.values())


@dataclasses.dataclass(frozen=True)
class Handed:
    """What the hook gave to a linear layer, and the watched attentions that ran before it."""

    salient: torch.Tensor | None
    group: torch.Tensor | None
    after: frozenset[str]


def _handed(case, model, batch, context, noise):
    """What the hook gives to every linear layer, by name; the watch; the calls of SeDA."""
    handed, inside = {}, []

    def note(function):
        def noted(*arguments):
            before = frozenset(name for name, *_ in watch.attention)
            salient, group = arguments[-3:-1] if function is semantic else (None, None)
            handed[inside[-1]] = Handed(salient, group, before)
            return function(*arguments)

        return noted

    semantic = ops.semantic_op
    with ExitStack() as stack:
        for name in case.streams:
            remember = functools.partial(lambda n, module, args: inside.append(n), name)
            handle = model.get_submodule(name).register_forward_pre_hook(remember)
            stack.callback(handle.remove)
        # each layer by itself, also where several read a large input together
        stack.enter_context(_replaced(dialect, "can_be_shared", lambda _: lambda x: False))
        stack.enter_context(_replaced(ops, "semantic_op", note))
        stack.enter_context(_replaced(ops, "dialect_op", note))
        grouped = stack.enter_context(_spy(refresh, "assign_groups"))
        watch = stack.enter_context(Watch(model, case.attentions))
        case.run(model, batch=batch, context=context, noise=noise)
    assert set(handed) == set(case.streams)
    return handed, watch, grouped


def _attention_of(case, name):
    """The watched attention in the same block as a linear layer."""

    def shared(attention):
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1],
            zip(attention.split("."), name.split("."), strict=False),
        )
        return len(list(same))

    best = max(case.attentions, key=shared)
    return best if shared(best) >= 2 else None


def _chosen_tokens(case, watch, fraction):
    """attention -> int64 [batch, S]: the grid indices of the tokens with the largest scores."""
    count = int(np.ceil(round(fraction * np.prod(case.grid), 6)))
    chosen = {}
    for name, scores in zip(case.attentions, _scores_in_grid_order(case, watch), strict=True):
        chosen[name] = scores.topk(count, dim=1).indices
    return chosen


def _scores_in_grid_order(case, watch):
    """float64 [batch, video tokens] of every watched attention, from the full map."""
    samples = [list(group) for _, group in itertools.groupby(watch.attention, lambda a: a[0])]
    assert [calls[0][0] for calls in samples] == list(case.attentions)
    result = []
    for calls in samples:
        keys = places(case)[1][calls[0][0]]
        scores = [_received(*call[1:]) for call in calls]
        if len(calls) == 1:
            scores = [scores[0].reshape(-1, keys.count)]
        result.append(torch.cat([sample[:, keys.video] for sample in scores]))
    return result


def _scores_in_row_order(case, watch):
    """The same, the tokens in the order of the attention's rows."""
    keys = places(case)[1]
    ordered = zip(case.attentions, _scores_in_grid_order(case, watch), strict=True)
    return [scores[:, keys[name].video.argsort()] for name, scores in ordered]


def _received(query, key, mask, scale):
    """float64 [rows, keys]: mean attention over heads and every sampled query."""
    weights = full_attention(full_logits(query, key, mask, scale))
    stride = max(1, query.shape[2] // 64)
    return torch.from_numpy(weights[:, :, ::stride].mean((1, 2)))


def _expected_rows(case, name, found, tokens, batch):
    """int64 [batch, S] ascending, or None."""
    stream = case.streams[name]
    if stream == CONTEXT:
        return None
    text = found.text.expand(batch, -1)
    if tokens is None or stream == TEXT:
        return text if text.shape[1] else None
    return torch.cat([found.video[tokens], text], dim=1).sort(dim=1).values


def _check_salient(name, handed, expected):
    salient = handed.salient
    if salient is None or expected is None:
        assert salient is expected, f"{name}: got {salient}, expected {expected}"
    else:
        got = salient.sort(dim=1).values
        assert torch.equal(got, expected), f"{name}: got {got}, expected {expected}"


def _check_groups(name, group, result, found):
    """Video rows carry the groups of their tokens; all others are free."""
    assert group is not None, name
    expected = torch.full((len(result), found.count), -1, dtype=group.dtype)
    expected[:, found.video] = result.to(group.dtype)
    assert torch.equal(group, expected), name


def swapped(layout):
    """The layout with text and video changing places."""
    other = {"first": "last", "last": "first", "video": "text", "text": "video"}
    kinds = []
    for kind in layout.kinds:
        streams = tuple((p, type(s)(other.get(s, s))) for p, s in kind.streams)
        kinds.append(dataclasses.replace(kind, text=other.get(kind.text), streams=streams))
    return dataclasses.replace(layout, kinds=tuple(kinds))


def check_swap_is_noticed(case):
    """:func:`check_rows` fails where text and video change places."""
    layout = swapped(layout_for(case.build()))
    try:
        check_rows(case, layout)
    except (AssertionError, ValueError):
        return
    raise AssertionError(f"{case}: check_rows does not notice text and video changing places")


def check_branches(case):
    """Guidance branches keep sets of their own, whoever runs in between.

    Where the model cannot be told the name of a branch, the calls of a step are numbered.
    """
    model = case.build()
    names = ("cond", "uncond") if hasattr(model, "cache_context") else ("call 0", "call 1")
    cond, uncond = names if hasattr(model, "cache_context") else (None, None)
    diffusers_hook.enable(model, **case.options)
    with _spy(refresh, "select_salient") as chosen:
        case.run(model, context=cond)
        case.run(model, context=uncond)
        case.run(model, context=cond, noise=case.later)
    assert len(chosen) == 2 * len(case.attentions)
    hook = diffusers_hook.model.attach.attached(model)
    for block in hook.state.blocks:
        if block.kind.attention is not None:
            calls = {name: branch.calls for name, branch in block.branches.items()}
            assert calls == {names[0]: 2, names[1]: 1}


def check_restored(case):
    """Quantized output is finite, different and repeatable; disable() restores every bit."""
    model = case.build()
    before = case.run(model)
    shape, tensors = picture(model), {k: v.clone() for k, v in model.state_dict().items()}
    quantized = []
    for _ in range(2):
        diffusers_hook.enable(model, **case.options)
        quantized.append(case.run(model))
        diffusers_hook.disable(model)
    assert quantized[0].isfinite().all()
    assert not torch.equal(quantized[0], before)
    assert torch.equal(*quantized)
    assert picture(model) == shape
    after = model.state_dict()
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(case.run(model), before)


def picture(model):
    """Everything one could see of a module tree but the tensors' values."""
    return {name: (type(part), _attributes(part)) for name, part in model.named_modules()}


def _attributes(part):
    seen = {}
    for name, value in vars(part).items():
        if isinstance(value, torch.Tensor | nn.Module):
            seen[name] = type(value)
        elif name == "processor":
            seen[name] = (type(value), value)
        elif isinstance(value, dict):
            seen[name] = sorted(map(str, value))
        elif isinstance(value, bool | int | float | str | tuple | type(None)):
            seen[name] = value
        else:
            seen[name] = type(value)
    return seen


CHECKS = (
    check_names,
    check_streams,
    check_scores,
    check_rows,
    check_swap_is_noticed,
    check_branches,
    check_restored,
)
"""What must hold for a family that is supported in full."""


@contextmanager
def _replaced(module, name, wrap):
    original = getattr(module, name)
    setattr(module, name, wrap(original))
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def _spy(module, name):
    """The calls of a module's function: [(arguments by name, result)]."""
    signature = inspect.signature(getattr(module, name))
    calls = []

    def watch(function):
        @functools.wraps(function)
        def watched(*args, **options):
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            result = function(*args, **options)
            calls.append((bound.arguments, result))
            return result

        return watched

    with _replaced(module, name, watch):
        yield calls
