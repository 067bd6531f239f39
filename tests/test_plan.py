"""The plan of a run: its memory against real trees, its arithmetic against that done by hand."""

import collections
import json
import pathlib
import re
import subprocess
import sys

import common
import jax
import numpy as np
import pytest
import tiny

from gemma_lora import ahead, hlo, plan
from gemma_lora.arch import Arch, get_arch
from gemma_lora.config import default
from gemma_lora.errors import UserError
from gemma_lora.sharding import AXES, bytes_a_device, make_mesh
from gemma_lora.weights.mapping import flatten


def config_of(**changes):
    c = default()
    c.update_from_flattened_dict({"data.seq_len": 32, "data.batch_size": 8, "dtype": "float32"})
    c.update_from_flattened_dict(changes)
    return c


ON_CPUS = """
import common, jax, os, tempfile
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
from gemma_lora import ahead
from gemma_lora.lora import LoRAConfig
from gemma_lora.optim import optimizer
from gemma_lora.plan import Job, plan, table
from gemma_lora.sharding import make_mesh, tree_shardings
from gemma_lora.step import init_state
from gemma_lora.weights.pretrained import build_model
from test_plan import config_of

arch = common.tiny_arch("gemma3")
c = config_of(**{"mesh.tensor": 4})
row = plan(Job(arch, c, "cpu:8"), 100, None)
assert row["fits"] is None and row["devices"] == 8 and "seconds" not in row
assert [x.partition(" ")[0] for x in row["whole"]] == ["K=2"]

mesh = make_mesh(c.mesh)
model = build_model(arch, c, LoRAConfig(**c.lora), mesh)
params = jax.device_get(common.tiny_params("gemma3"))
base = jax.device_put(params, tree_shardings(model.abstract()["params"], mesh))
state = init_state(model, optimizer(c.optim, 10), 0, mesh)
held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
assert row["trees"]["base"] == held(base) and row["trees"]["state"] == held(state)
true = held((base, state)) + 6 * 4 * 8 * 32 // 2  # six arrays of 4 bytes, 8 rows over fsdp 2
assert abs(row["train"]["arguments"] / true - 1) < 0.01, (row["train"]["arguments"], true)
assert row["train"]["flops"] > 2.5 * row["eval"]["flops"] > 0
assert row["train"]["sent"]["all-gather"] > 0

# However the rows are cut, they take the same products.
cut = plan(Job(arch, config_of(**{"mesh.tensor": 4, "train.micro_batches": 4}), "cpu:8"), 100, None)
assert cut["train"]["flops"] == row["train"]["flops"] > cut["eval"]["flops"] == row["eval"]["flops"]

ahead.lowered = None  # from now on nothing can be compiled
again = plan(Job(arch, c, "cpu:8"), 100, None)
assert again == row
assert "memory not known" in table([row], None)
odd = plan(Job(arch, config_of(**{"data.batch_size": 6}), "cpu:4"), None, None)
assert "multiple of 4" in odd["error"] and "cannot run" in table([odd], None)
odd = plan(Job(arch, config_of(attention="splash"), "cpu:8"), None, None)
assert "it is a TPU kernel" in odd["error"]
print("equal")
"""


def test_arguments_are_the_bytes_of_the_sharded_trees():
    """And the second plan is read from disk."""
    common.on_eight_devices(ON_CPUS)


FOUND = {
    "arguments": 4 * 2**30, "padding": 2**28, "temporaries": 2**30, "outputs": 0, "code": 0,
    "flops": 197e12 / 2, "attention": 0, "traffic": 819e9 / 4,
    "sent": {"all-gather": 200e9 * 0.75}, "unknown_loops": 0, "seconds": 1.0,
}  # fmt: skip


@pytest.fixture
def job(monkeypatch):
    """A job whose programs take known amounts, on one absent chip."""
    monkeypatch.setattr(ahead, "devices_of", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(
        ahead, "facts", lambda *a: {k: v / 4 if k == "flops" else v for k, v in FOUND.items()}
    )
    c = config_of(**{"train.epochs": 2, "train.eval_every": 0.5, "data.validation_fraction": 0.2})
    return plan.Job(common.tiny_arch("gemma3"), c, "v5e:1x1")


PRICES = {
    "source": "https://a.b", "date": "2026-01-31", "currency": "USD", "chip_hour": {"v5e": 36.0}
}  # fmt: skip


def test_time_and_money_by_hand(job):
    """Collectives bound both steps: 0.75 s. Of 1,000 examples 800 train: 2 x 100 steps; 200 are
    held out: 5 evaluations of 2 sets of 25 batches. 450 steps are 337.5 s."""
    row = plan.plan(job, 1000, PRICES)
    assert row["fits"] and row["bound"] == "collectives"
    assert row["bounds"]["train"] == {"products": 0.125, "HBM": 0.25, "collectives": 0.75}
    assert (row["steps"], row["eval_steps"]) == (200, 250)
    assert row["hours"] == pytest.approx(337.5 / 3600)
    assert row["money"] == pytest.approx(337.5 / 100)
    assert row["tokens_a_second"] == pytest.approx(8 * 32 / 0.75)
    text = plan.table([row], PRICES)
    assert "counted once" not in text
    row["train"]["unknown_loops"] = 2
    assert "2 loops as long as the data say, counted once" in plan.table([row], PRICES)
    assert "padding to the chip's tiles 0.250" in text
    assert "3.38 USD" in text and "https://a.b, 2026-01-31" in text
    # A ledger at each end takes all 100 batches of the training set in the place of the probe's 25;
    # a batch that is not full is a step; at most 16 examples are 2 batches of each set.
    for changes, expected in (
        ({"train.ledger_every": 1000}, (200, 5 * 25 + 3 * 25 + 2 * 100)),
        ({"data.validation_fraction": 0.199}, (202, 6 * 50)),  # at 0, 50, 100, 150, 200, 202
        ({"train.eval_examples": 16}, (200, 20)),
    ):
        config = job.config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        row = plan.plan(job._replace(config=config), 1000, None)
        assert (row["steps"], row["eval_steps"]) == expected, changes


@pytest.mark.parametrize("examples", [2, 3, 5])
def test_of_few_examples_one_is_held_out(job, examples):
    row = plan.plan(job, examples, None)
    assert (row["steps"], row["eval_steps"]) == (2, 6)  # a batch of each set, at 0, 1 and 2


def test_examples_are_counted_where_nothing_is_fetched():
    count = plan.count_examples
    assert count(config_of(**{"data.source": "generated:7"})) == 7
    assert count(config_of(**{"data.source": "generated:7", "data.limit": 5})) == 5
    assert count(config_of(**{"data.source": "tfds:gsm8k"})) is None
    with pytest.raises(UserError, match="plan fetches no data set; give a file"):
        plan._steps(config_of(**{"data.validation_path": "tfds:gsm8k/test"}), 10)


@pytest.mark.parametrize(("tensor", "heads"), [(1, 4), (2, 2), (4, 4)])
def test_heads_stay_with_their_keys_in_the_attention_counted(tensor, heads):
    """Gemma 2 tiny: 4 heads, 2 of keys; of 16 positions a local layer sees the last 8."""
    arch = common.tiny_arch("gemma2")
    assert (arch.heads, arch.kv_heads) == (4, 2)
    mesh = jax.sharding.AbstractMesh((1, 1, tensor), AXES)
    seen = [sum(min(i + 1, 8 if local else 16) for i in range(16)) for local in arch.is_local]
    got = plan._attention_flops({"attention": 3}, arch, mesh, 2, 16)
    assert got == 3 * 2 * np.mean(seen) * 2 * heads * arch.head_dim


def test_nothing_is_assumed_that_was_not_given(job):
    row = plan.plan(job, None, None)
    assert row["hours"] is None and row["money"] is None
    assert "--examples not given" in plan.table([row], None) and "no price" in plan.table(
        [row], None
    )
    row = plan.plan(job, 1000, PRICES | {"chip_hour": {"v6e": 1.0}})
    assert row["hours"] and row["money"] is None and "no price" in plan.table([row], PRICES)


def test_a_run_that_does_not_fit_says_by_how_much(job, monkeypatch):
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (24.50G) exceeds available HBM (15.75G). HLO module: x."
    )
    refused = ahead._refusal(message)
    assert refused["needs"] == 24.5 * 2**30 and refused["available"] == 15.75 * 2**30
    assert ahead._refusal("Ran out of memory. Used 20.00G of 15.75G hbm.")["needs"] == 20 * 2**30
    assert ahead._refusal("INVALID_ARGUMENT") == {}
    monkeypatch.setattr(ahead, "facts", lambda *a: refused)
    row = plan.plan(job, 1000, None)
    assert row["fits"] is False
    assert "no, by 8.75 GiB" in plan.table([row], None)


@pytest.mark.parametrize("most", [1, 7, 8, 53, 1000])
def test_the_largest_batch_is_found_in_few_compiles(job, monkeypatch, most):
    """Memory is a line with a step; what is too large is refused without a number in GiB."""
    tried = []

    def facts(arch, config, topology, mesh, rows, length, step):
        tried.append(rows)
        if rows > most:
            return ahead._refusal(f"Used {16 + (rows - most) / 64:.2f}G of 15.75G hbm")
        return FOUND | {"temporaries": 2**30 + rows * (11 * 2**30 // (most + 1))}

    monkeypatch.setattr(ahead, "facts", facts)
    found = plan.largest(job)
    assert (found["rows"], found["too_many"]) == (most, most + 1)
    assert len(tried) == len(set(tried)) <= 16, tried


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"date": "soon"}, "date"),
        ({"source": ""}, "expected source"),
        ({"chip_hour": {"v5e": "cheap"}}, "expected source"),
        ({"chip_hour": {"v5f": 1.0}}, "v5e"),
    ],
)
def test_prices_without_a_date_or_source_are_refused(tmp_path, change, hint):
    file = tmp_path / "prices.json"
    file.write_text(json.dumps(PRICES))
    assert plan.read_prices(str(file)) == PRICES
    file.write_text(json.dumps(PRICES | change))
    with pytest.raises(UserError, match=hint):
        plan.read_prices(str(file))


@pytest.mark.usefixtures("quick")
def test_the_default_remat_runs_no_product_twice_and_the_state_is_given_away():
    arch, mesh, (rows, length) = common.tiny_arch("gemma3"), common.one_device(), (2, 16)
    compiled = ahead.lowered(arch, config_of(), mesh, rows, length, "train").compile()
    trees = ahead.shapes(arch, config_of(), mesh, rows, length)
    assert config_of().remat == "matmuls"
    found = hlo.products(
        hlo.parse(compiled.as_text()), ahead.letter_sizes(arch, mesh, rows, length)
    )
    flops = sum(v for (path, _), v in found.items() if ".product" in path)
    of_adapters = sum(v for (_, eqn), v in found.items() if "R" in eqn)
    layers = flatten(trees["base"]["layers"])
    matrices = sum(x.size for path, x in layers.items() if path.endswith("_proj/w"))
    assert flops == 2 * (2 * rows * length * matrices)  # forward, and the gradient of its input
    adapters = sum(x.size for x in jax.tree.leaves(trees["state"].lora))
    assert of_adapters == 3 * (2 * rows * length * adapters)  # and their own gradient
    state = sum(map(bytes_a_device, jax.tree.leaves(trees["state"])))
    assert compiled.memory_analysis().alias_size_in_bytes >= state


@pytest.mark.once
def test_leaves_on_the_command_line():
    """[18,640,2048] bfloat16 of up_proj over two devices."""
    line = "-m gemma_lora.plan --config configs/gemma3_270m_gsm8k.py --topology cpu:2 --leaves"
    line += " --config.optim.warmup_steps=200"
    command, root = [sys.executable, *line.split()], pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (up,) = [x for x in done.stdout.splitlines() if x.startswith("base/layers/mlp/up_proj/w ")]
    assert up.split()[-3:] == ["23,592,960", "of", "47,185,920"]
    for change, words in (
        (("cpu:2", "cpu:x"), "topology 'cpu:x': expected cpu:1 to cpu:1024"),
        (("cpu:2", "cpu:0"), "topology 'cpu:0': expected cpu:1 to cpu:1024"),
        (("--leaves", "--examples=9 --config.data.batch_size=9"), "cpu:2 cannot run: data.batch_"),
        (("cpu:2", "cpu:16"), "data.batch_size is 8"),
        (("--leaves", "--largest --examples=9"), "the memory of a cpu:2 is not known"),
    ):
        wrong = subprocess.run([sys.executable, *line.replace(*change).split()], cwd=root,
                               capture_output=True, text=True)  # fmt: skip
        assert wrong.returncode == 2 and words in wrong.stderr
        assert "Traceback" not in wrong.stderr


# A quarter of D fills the lanes of a TPU: less would be padded, and not what the trees say.
SMALL = tiny.TINY["gemma2"] | {
    "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 128,
    "num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 128, "vocab_size": 4096,
}  # fmt: skip


@pytest.fixture
def tpu_compiler():
    common.needs("libtpu")
    with common.all_passes():
        yield


@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize("name", ("small", "gemma_2b"))
def test_no_whole_weight_and_no_logits_in_the_program_for_a_tpu(name):
    """Small: soft-caps, windows and packed rows; arguments within 1 % of the sharded trees."""
    arch = Arch.from_hf(SMALL) if name == "small" else get_arch(name)
    c = config_of(**{"dtype": "bfloat16", "data.seq_len": 256, "head.chunk": 512})
    mesh = make_mesh(c.mesh, ahead.devices_of("v5e:2x2"))
    rows, length = 16, 256
    # Gemma 2B as users get it; the small one shows what is in a program, however well compiled.
    effort = -1.0 if name == "small" else 0.0
    with common.jax_settings(jax_exec_time_optimization_effort=effort):
        compiled = ahead.lowered(arch, c, mesh, rows, length, "train").compile()
    trees = ahead.shapes(arch, c, mesh, rows, length)
    true = sum(map(bytes_a_device, jax.tree.leaves(trees)))
    program = hlo.parse(compiled.as_text())
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert abs(arguments / true - 1) < 0.01
    assert arguments == true + hlo.padding(program)
    assert program.unknown == 0 and hlo.attention_products(program) > 0
    gathers = [c for c in hlo.collectives(program) if c.kind == "all-gather"]
    # In the loop over layers it gathers a layer's matrices, so what follows can fail.
    one = arch.embed * arch.hidden
    assert any(c.times > 1 and c.results[0].elements == one for c in gathers)
    assert not any(x.elements >= arch.layers * one // 2 for c in gathers for x in c.results)
    if name == "gemma_2b":  # the small one's compiler does not try
        # The gathers of a loop are fused with products that run meanwhile, those of the table too.
        # Waited for are the adapters' gradients, once a layer, and the matrices that a layer's
        # forward begins with.
        fused = {op.called() for _, _, op, _ in program.ops() if op.kind == "fusion"}
        kinds, channels = collections.defaultdict(set), collections.defaultdict(dict)
        for computation, _, op, times in program.ops():
            kinds[computation].add(op.kind)
            if times > 1 and (channel := re.search(r"channel_id=(\d+)", op.text)):
                channels[channel[1]][computation] = op
        waited = [
            next(iter(parts.values()))
            for parts in channels.values()
            if not any(c in fused and "convolution" in kinds[c] for c in parts)
        ]
        assert len(channels) > len(waited) + 10
        first = {arch.embed * n * arch.head_dim for n in (arch.heads, arch.kv_heads)}
        assert all(
            op.elements in first and "Transformer" in op.source
            for op in waited
            if op.kind != "all-reduce"
        )
        assert sum(op.kind == "all-reduce" for op in waited) == 1
        # GELU in the operands of down's two forward products, of its A's gradient, and for its own
        # gradient: not again in each of the six products by that.
        tanh = sum(op.elements * times for _, _, op, times in program.ops() if op.kind == "tanh")
        assert tanh == 4 * arch.layers * (rows * length // mesh.size) * arch.hidden
    # Nor the table, nor the logits of a device's rows, in any buffer. It has more tokens than
    # columns of the table, so its part of that is smaller.
    assert not any(x.elements >= arch.vocab * arch.embed for c in gathers for x in c.results)
    tokens = rows * length // mesh.size
    logits = [
        op.text
        for _, _, op, _ in program.ops()
        for x in op.results
        if arch.vocab in x.shape and x.elements >= tokens * arch.vocab
    ]
    assert not logits, logits[0]


@pytest.fixture(scope="module")
def new_cache(tmp_path_factory):
    """What was compiled before these tests does not count; what one of them compiled does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.usefixtures("tpu_compiler", "new_cache")
def test_offload_keeps_one_result_of_every_layer_in_the_hosts_memory():
    arch, topology, rows, length = Arch.from_hf(SMALL), "v5e:2x2", 16, 256
    found = {}
    for remat in ("matmuls", "offload"):
        c = config_of(**{"dtype": "bfloat16", "data.seq_len": length, "remat": remat})
        mesh = make_mesh(c.mesh, ahead.devices_of(topology))
        with common.jax_settings(jax_exec_time_optimization_effort=-1.0):
            found[remat] = ahead.facts(arch, c, topology, mesh, rows, length, "train")
    kept = arch.layers * rows * length // mesh.size * arch.hidden * 2  # bfloat16
    assert [found[k]["host"] for k in found] == [0, kept]
    spared = found["matmuls"]["temporaries"] - found["offload"]["temporaries"]
    assert kept / 2 < spared < 1.5 * kept
    # No product runs twice: layer 0's, whose input needs no gradient, run once less at most.
    assert 0.9 < found["offload"]["flops"] / found["matmuls"]["flops"] <= 1


@pytest.mark.usefixtures("tpu_compiler", "new_cache")
def test_a_tpu_takes_the_same_products_however_the_rows_are_cut():
    """The scan over micro-batches and the rows of its products make up for each other."""
    found = []
    for micro_batches in (1, 4):
        changes = {"data.seq_len": 256, "data.batch_size": 16}
        changes |= {"dtype": "bfloat16", "train.micro_batches": micro_batches}
        job = plan.Job(Arch.from_hf(SMALL), config_of(**changes), "v5e:2x2")
        # How the rest is optimised changes no product, and takes most of the compiler's time.
        with common.jax_settings(jax_exec_time_optimization_effort=-1.0):
            row = plan.plan(job, None, None)
        assert row["attention"].startswith("splash") and row["train"]["attention"] > 0
        found.append([row[step]["flops"] for step in ahead.STEPS])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
