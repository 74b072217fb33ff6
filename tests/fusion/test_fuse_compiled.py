"""Fused models under torch's transformations: compiled, exported, distributed, differentiated by torch.func."""

import datetime
import os

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffkern
from tests.fusion.compare import OPTIONS, Run, assert_close, in_float64, relative, run
from tests.fusion.small import conditional, conditional_inputs, images, inputs, unet

ALL = OPTIONS[-1]


def fused(model, **options):
    diffkern.fuse(model, **options)
    return model


def tiny(**settings):
    """Without attention, for speed."""
    return unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
        **settings,
    )


def as_tensor(model):
    return lambda sample, timestep: model(sample, timestep, return_dict=False)[0]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SCALE_SHIFT = {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet"}


@pytest.mark.parametrize(("settings", "options"), [({}, {}), (SCALE_SHIFT, ALL)])
def test_compile_for_inference_and_training_without_graph_breaks(settings, options):
    plain, model = tiny(**settings), fused(tiny(**settings), **options)
    compiled = torch.compile(as_tensor(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative(compiled(**inputs()), plain(**inputs()).sample) <= 2e-5
    assert_close(run(model, inputs(), compiled), in_float64(plain, inputs()))


def test_compile_with_attention_without_graph_breaks():
    compiled = torch.compile(fused(conditional(), **ALL), fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = conditional()(**conditional_inputs()).sample
        assert relative(compiled(**conditional_inputs()).sample, expected) <= 2e-5


def test_fuse_after_compile_takes_effect_and_unfuse_too():
    model = tiny()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = compiled(**inputs()).sample
        fused(compiled, **ALL)
        assert any(hasattr(type(m), "origin") for m in model.modules())
        assert relative(compiled(**inputs()).sample, expected) <= 2e-5
        diffkern.unfuse(compiled)
        assert torch.equal(compiled(**inputs()).sample, expected)


@pytest.mark.parametrize("options", [{}, ALL])
def test_export(options):
    model = fused(tiny(), **options)
    exported = torch.export.export(model, (), inputs())
    assert any("diffkern.group_norm" in str(node.target) for node in exported.graph.nodes)
    with torch.no_grad():
        got = exported.module()(**inputs()).sample
    assert relative(got, tiny()(**inputs()).sample) <= 2e-5


def gradients_of_all(rank, folder):
    """Of a model in `DistributedDataParallel`: not fused, fused before and fused after; rank 0 saves them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    for when in ("never", "before", "after"):
        model = tiny()
        if when == "before":
            diffkern.fuse(model, **ALL)
        parallel = nn.parallel.DistributedDataParallel(model)
        if when == "after":
            diffkern.fuse(parallel, **ALL)
        for _ in range(2):  # the second backward uses the order that the first one found
            parallel.zero_grad()
            loss = parallel(**inputs()).sample[rank].square().mean()
            loss.backward()
        if rank == 0:
            torch.save((loss.detach(), {k: p.grad for k, p in model.named_parameters()}), f"{folder}/{when}.pt")
    torch.distributed.barrier()
    # Without taking the group down: gloo's destructor joins its threads while it holds the interpreter's lock, and such
    # a thread may be waiting for that lock to free the state that a reduction was started with.
    os._exit(0)


def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(gradients_of_all, (str(tmp_path),), nprocs=2)
    expected = Run(*torch.load(tmp_path / "never.pt"))
    for when in ("before", "after"):
        assert_close(Run(*torch.load(tmp_path / f"{when}.pt")), expected)
    alone = tiny()
    sum(alone(**inputs()).sample[rank].square().mean() / 2 for rank in range(2)).backward()
    assert_close(expected, Run(expected.output, {k: p.grad for k, p in alone.named_parameters()}))


@pytest.mark.parametrize("options", [{}, ALL])
def test_functional_call_and_jacobian(options):
    plain, model = tiny(), fused(tiny(), **options)
    parameters = {name: 0.9 * p.detach() for name, p in plain.named_parameters()}
    arguments = inputs(1)

    def with_parameters(module):
        return torch.func.functional_call(module, parameters, (), arguments).sample

    assert relative(with_parameters(model), with_parameters(plain)) <= 2e-5

    def of_scale(module):
        def pooled(scale):
            return module(arguments["sample"] * scale, arguments["timestep"]).sample.mean((2, 3)).flatten()

        return torch.func.jacrev(pooled, chunk_size=1)(torch.ones(3, 1, 1))

    assert relative(of_scale(model), of_scale(plain)) <= 2e-5

    def gradients(module):
        def loss(parameters):
            return torch.func.functional_call(module, parameters, (), arguments).sample.square().mean()

        return torch.func.grad(loss)(parameters)

    ours, theirs = gradients(model), gradients(plain)
    assert all(relative(ours[name], theirs[name]) <= 2e-5 for name in theirs if name.endswith("weight"))


def test_second_derivatives():
    def penalty(module):
        x = images(1).double().requires_grad_()
        (gradient,) = torch.autograd.grad(module(x, 3).sample.square().sum(), x, create_graph=True)
        module.zero_grad()
        gradient.square().mean().backward()
        return {name: p.grad for name, p in module.named_parameters()}

    expected, got = penalty(tiny().double()), penalty(fused(tiny()).double())
    assert all(g is expected[name] is None or torch.equal(g, expected[name]) for name, g in got.items())


# Of channels-last images torch's own group_norm has no forward-mode derivative.
@pytest.mark.parametrize("options", [{}, {"fold_upsample": True, "virtual_concat": True}])
def test_forward_mode(options):
    def along(model):
        return torch.func.jvp(lambda x: model(x, 3).sample, (images(1),), (images(1, seed=9),))

    for mine, theirs in zip(along(fused(tiny(), **options)), along(tiny()), strict=True):
        assert relative(mine, theirs) <= 2e-5


def test_symbolic_trace_of_a_model_nobody_knows():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.GroupNorm(4, 4))
    expected = model(images())
    traced = torch.fx.symbolic_trace(fused(model))
    assert relative(traced(images()), expected) <= 2e-5


def test_export_takes_batches_of_any_size():
    model = fused(tiny(), **ALL)
    arguments = {"sample": images(4), "timestep": torch.arange(4)}
    any_size = {name: {0: torch.export.Dim.AUTO} for name in arguments}
    exported = torch.export.export(model, (), arguments, dynamic_shapes=any_size)
    got = exported.module()(sample=images(7), timestep=torch.arange(7)).sample
    assert relative(got, tiny()(images(7), torch.arange(7)).sample) <= 2e-5


@pytest.mark.parametrize("options", [{}, {"virtual_concat": True}, ALL])
def test_freeu(options):
    plain, model = conditional(), fused(conditional(), **options)
    before = run(plain, conditional_inputs()).output
    for m in (plain, model):
        m.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    expected = run(plain, conditional_inputs())
    assert relative(expected.output, before) > 1e-3
    assert_close(run(model, conditional_inputs()), expected, unfused=expected)
    for m in (plain, model):
        m.disable_freeu()
    assert relative(run(model, conditional_inputs()).output, before) <= 2e-5


@pytest.mark.parametrize("first", ["fuse", "qkv"])
def test_fuse_qkv_projections(first):
    plain, model = conditional(), conditional()
    if first == "fuse":
        fused(model, **ALL)
    for m in (plain, model):
        m.fuse_qkv_projections()
    if first == "qkv":
        fused(model, **ALL)
    with torch.no_grad():
        expected = plain(**conditional_inputs()).sample
        assert relative(model(**conditional_inputs()).sample, expected) <= 2e-5
        model.unfuse_qkv_projections()
        assert relative(model(**conditional_inputs()).sample, expected) <= 2e-5


@pytest.mark.parametrize("options", OPTIONS)
def test_inference_mode(options):
    plain, model = unet(), fused(unet(), **options)
    with torch.inference_mode():
        got, expected = model(**inputs()).sample, plain(**inputs()).sample
    assert got.is_inference()
    assert relative(got, expected) <= 2e-5
    with torch.inference_mode():
        inside = fused(unet(), **options)(**inputs()).sample
    assert torch.equal(inside, got)
