"""Does a model of full size load and train here: a random checkpoint, one step, the peak memory.

    python tests/benchmarks/full_size.py gemma_2b DIRECTORY [--config.key=value ...]

writes DIRECTORY/weights (Hugging Face's format, bfloat16, a shard a layer; kept for another time)
and runs a recipe for one step in a process of its own, whose last lines name its peak memory.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gemma_lora.arch import Arch, get_arch
from gemma_lora.weights import mapping

TESTS = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import tiny_tokenizer  # noqa: E402


def tensors(arch: Arch) -> Iterator[tuple[str, str, np.ndarray]]:
    """(shard, name, values) of every tensor: random matrices and biases of size 1 / sqrt(width),
    norms that multiply by 1."""
    block = np.random.default_rng(0).standard_normal(2**22, np.float32) * arch.embed**-0.5
    block = block.astype(ml_dtypes.bfloat16)
    for ours, (letters, shape) in mapping.leaves(arch).items():
        layers = shape[0] if letters[0] == "L" else None
        for i in range(layers or 1):
            own = shape if layers is None else shape[1:]
            one = ours.endswith("/scale") and not arch.norm_plus_one
            values = np.full(own, one, block.dtype) if len(own) == 1 else np.resize(block, own)
            layer = None if layers is None else i
            shard = "others" if layers is None else f"layer-{i:02d}"
            yield shard, *mapping.hf_tensor(arch, ours, values, layer)


def write(arch: Arch, directory: pathlib.Path) -> None:
    shards: dict[str, dict[str, np.ndarray]] = {}
    for shard, name, values in tensors(arch):
        shards.setdefault(f"{shard}.safetensors", {})[name] = values
    for shard, part in shards.items():
        contiguous = {k: np.ascontiguousarray(v) for k, v in part.items()}
        save_file(contiguous, directory / shard, metadata={"format": "pt"})
    where = {name: shard for shard, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(arch.to_hf()))
    tiny_tokenizer.write_tokenizer(directory)


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    name, directory, *overrides = sys.argv[1:]
    weights = pathlib.Path(directory) / "weights"
    if not weights.exists():
        unfinished = weights.with_name("weights.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(get_arch(name), unfinished)
        unfinished.rename(weights)
    workdir = pathlib.Path(directory) / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    settings = {
        "arch": name,
        "weights": weights,
        "data.source": "generated:40",
        "data.seq_len": 256,
        "data.batch_size": 2,
        "train.max_steps": 1,
        "train.eval_examples": 2,
    }
    recipe = TESTS.parent / "configs" / "gemma_2b_gsm8k.py"
    flags = [f"--config.{k}={v}" for k, v in settings.items()]
    command = [sys.executable, "-m", "gemma_lora.train", f"--config={recipe}"]
    command += [f"--workdir={workdir}", *flags, *overrides]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
