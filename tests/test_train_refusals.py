"""What train refuses, before anything expensive and with nothing left behind."""

import shutil

import pytest
import tiny_run
from tiny_run import settings

from gemma_lora import adapters, config, evaluate, train
from gemma_lora.errors import UserError
from gemma_lora.weights import peft


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"lora.rank": 0}, "lora.rank is 0, expected a whole number, at least 1"),
        ({"lora.targets": "w_[qk]"}, "matches no module. Names: attn/k_proj"),
        ({"data.batch_size": 6, "train.micro_batches": 4}, "data.batch_size 6 is not a multiple"),
        ({"data.seq_len": 8, "data.loss_on": "completion"}, "data.seq_len 8"),
        ({"optim.warmup_steps": 8}, "optim.warmup_steps is 8"),
        ({"mesh.tensor": 3}, "needs 3 devices"),
        ({"lora.init": "pissa", "lora.rank": 99}, "expected at most that as the rank"),
    ],
)
def test_bad_input_leaves_no_run(changes, message, inputs, tmp_path, monkeypatch):
    """Nor does it wait for the weights."""
    monkeypatch.setattr(train, "load_base", None)
    c = settings(inputs, changes)
    with pytest.raises(UserError) as error:
        config.check(c)  # as the command line does first
        tiny_run.run(tmp_path, c)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} <= {".lock", "config.json"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.path", "rows.jsonl does not exist, did you mean row.jsonl?"),
        ("data.validation_path", "rows.jsonl does not exist, did you mean row.jsonl?"),
        ("data.exclude", "data.exclude .*rows.jsonl cannot be read: .*No such file"),
    ],
)
def test_a_file_that_is_not_there_is_said_before_the_weights_are_looked_for(
    key, message, inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "open_weights", None)
    (tmp_path / "row.jsonl").touch()
    with pytest.raises(UserError, match=message):
        tiny_run.run(tmp_path / "run", settings(inputs, {key: str(tmp_path / "rows.jsonl")}))
    assert not (tmp_path / "run").exists()


def test_a_variant_without_a_spelling_is_refused_before_the_weights_are_loaded(
    inputs, tmp_path, monkeypatch
):
    """As a fork's first tries would be: of the leaves of others, and with one of its own."""

    class Plain(adapters.LoRA):
        pass

    class Scaled(adapters.DoRA):
        pass

    monkeypatch.setattr(train, "load_base", None)
    monkeypatch.setitem(adapters.VARIANTS, "plain", Plain)
    monkeypatch.setitem(adapters.VARIANTS, "scaled", Scaled)
    parts = {k: v for k, v in peft._PARTS.items() if k != "m"}
    for name, spelled, why in (
        ("plain", peft._PARTS, "it would be read as 'lora'"),
        ("scaled", peft._PARTS, "no place for: .*lora_magnitude_vector"),
        ("dora", parts, "no name for a leaf 'm'"),
    ):
        monkeypatch.setattr(peft, "_PARTS", spelled)
        with pytest.raises(UserError, match=rf"lora.variant '{name}' cannot be exported.*{why}"):
            tiny_run.run(tmp_path / name, settings(inputs, {"lora.variant": name}))


def test_python_callers_get_the_checks_of_the_command_line(inputs, tmp_path):
    c = settings(inputs)
    c.optim.learning_rate = 1e-3
    with pytest.raises(UserError, match=r"'optim.learning_rate' is unknown"):
        train.train(c, tmp_path / "run")
    with pytest.raises(UserError, match=r"'optim.learning_rate' is unknown"):
        evaluate.evaluate(c, tmp_path / "out", None)
    assert not any(tmp_path.iterdir())


def test_more_steps_than_a_run_has_time_for(inputs, tmp_path):
    with pytest.raises(UserError, match=r"1,000,000,000 steps, expected at most 100,000,000"):
        tiny_run.run(tmp_path, settings(inputs, {"train.max_steps": 10**9}))


def test_no_room_for_the_checkpoints_is_said_before_the_weights_are_loaded(
    inputs, tmp_path, monkeypatch
):
    """Room enough for all else: the adapters and their moments are known once the model is."""
    usage = shutil.disk_usage(tmp_path)._replace(free=64 * 2**20 + 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(train, "load_base", None)
    with pytest.raises(UserError, match="has 64 MiB free, this run needs about 65 MiB"):
        tiny_run.run(tmp_path, settings(inputs, {"lora.rank": 64}))
