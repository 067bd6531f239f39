"""The table of models against their published config.json files; imports go one way."""

import ast
import dataclasses
import json
from pathlib import Path

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny

from gemma_lora.arch import ARCHS, FAMILIES, Arch, get_arch
from gemma_lora.errors import UserError
from gemma_lora.lora import count
from gemma_lora.model import Transformer

PACKAGE = Path(__file__).parents[1] / "gemma_lora"

# What the config.json files on the Hub say, in their own words; sizes as D, F, L, N, K, H, V.
_GEMMA = {"model_type": "gemma", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
_GEMMA2 = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "rope_theta": 10_000.0,
}
_GEMMA3 = {"model_type": "gemma3_text", "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000}
_QWEN2 = {
    "model_type": "qwen2",
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
    "sliding_window": 32_768,
}
_Q256 = {"query_pre_attn_scalar": 256}
_FACTOR = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
PUBLISHED = {
    "gemma_2b": (_GEMMA, (2048, 16_384, 18, 8, 1, 256, 256_000)),
    "gemma_7b": (_GEMMA, (3072, 24_576, 28, 16, 16, 256, 256_000)),
    "gemma2_2b": (_GEMMA2 | _Q256, (2304, 9216, 26, 8, 4, 256, 256_000)),
    "gemma2_9b": (
        _GEMMA2 | {"query_pre_attn_scalar": 256},
        (3584, 14_336, 42, 16, 8, 256, 256_000),
    ),
    "gemma2_27b": (
        _GEMMA2 | {"query_pre_attn_scalar": 144},
        (4608, 36_864, 46, 32, 16, 128, 256_000),
    ),
    "gemma3_270m": (
        _GEMMA3 | {"sliding_window": 512, "_sliding_window_pattern": 6},
        (640, 2048, 18, 4, 1, 256, 262_144),
    ),
    "gemma3_1b": (
        _GEMMA3 | {"sliding_window": 512, "sliding_window_pattern": 6},
        (1152, 6912, 26, 4, 1, 256, 262_144),
    ),
    # Its file leaves heads and vocabulary to transformers' defaults.
    "gemma3_4b": (
        _GEMMA3 | _FACTOR | {"sliding_window": 1024},
        (2560, 10_240, 34, None, None, None, None),
    ),
    "gemma3_12b": (
        _GEMMA3 | _FACTOR | {"sliding_window": 1024},
        (3840, 15_360, 48, 16, 8, 256, 262_208),
    ),
    "gemma3_27b": (
        _GEMMA3 | _FACTOR | {"sliding_window": 1024, "query_pre_attn_scalar": 168},
        (5376, 21_504, 62, 32, 16, 128, 262_208),
    ),
    "qwen2_0p5b": (_QWEN2 | {"tie_word_embeddings": True}, (896, 4864, 24, 14, 2, None, 151_936)),
    "qwen2_1p5b": (_QWEN2 | {"tie_word_embeddings": True}, (1536, 8960, 28, 12, 2, None, 151_936)),
    "qwen2_7b": (_QWEN2 | {"tie_word_embeddings": False}, (3584, 18_944, 28, 28, 4, None, 152_064)),
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
# Published counts of all parameters, a tied head counted once (text model alone).
PARAMETERS = {
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "qwen2_0p5b": 494_032_768,
    "qwen2_1p5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
}


@pytest.mark.parametrize("name", ARCHS)
def test_table_equals_published_config(name):
    facts, sizes = PUBLISHED[name]
    config = facts | {k: v for k, v in zip(SIZES, sizes, strict=True) if v is not None}
    assert dataclasses.asdict(Arch.from_hf(config)) == dataclasses.asdict(ARCHS[name])


@pytest.mark.usefixtures("quick")
def test_the_embedding_scale_is_rounded_to_the_dtype_as_in_hugging_face():
    """Their normalizer is torch.tensor(hidden_size**0.5, dtype=hidden_states.dtype)."""
    arch = common.tiny_arch("gemma")

    class Start(Transformer):
        @nn.compact
        def __call__(self, tokens, positions):
            return self.start(tokens, positions)[0]

    tokens = jnp.arange(8)[None]
    x, variables = Start(arch, dtype=jnp.bfloat16).init_with_output(
        jax.random.key(0), tokens, tokens
    )
    scale = jnp.bfloat16(arch.embed**0.5)
    assert float(scale) != arch.embed**0.5  # or no rounding would be seen
    rows = nn.unbox(variables["params"])["embed"]["w"][tokens].astype(jnp.bfloat16)
    assert x.dtype == jnp.bfloat16 and (x == rows * scale).all()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert count(Transformer(ARCHS[name]).abstract()["params"]) == PARAMETERS[name]


def test_spellings_of_transformers_5():
    """layer_types and rope_parameters say what sliding_window_pattern and rope_scaling said."""
    old = tiny.TINY["gemma3_rope8"]
    new = {k: v for k, v in old.items() if "rope" not in k and k != "sliding_window_pattern"}
    new["layer_types"] = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    a, b = Arch.from_hf(old), Arch.from_hf(new)
    assert a.is_local == b.is_local == (True,) * 5 + (False, True)
    assert dataclasses.replace(a, local=b.local) == b


EVERY = ARCHS | {name: Arch.from_hf(config) for name, config in tiny.TINY.items()}


@pytest.mark.parametrize("name", EVERY)
def test_to_hf_reads_back(name):
    written = json.loads(json.dumps(EVERY[name].to_hf()))
    assert Arch.from_hf(written) == EVERY[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_to_hf_is_the_published_config_to_transformers(name):
    """What transformers makes of our config.json is what it makes of the published one."""
    transformers = common.needs("transformers")
    auto = common.needs("transformers.models.auto.modeling_auto")
    facts, sizes = PUBLISHED[name]
    published = facts | {k: v for k, v in zip(SIZES, sizes, strict=True) if v is not None}
    published["architectures"] = [
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[facts["model_type"]]  # all the files have it
    ]
    ours, theirs = (
        transformers.AutoConfig.for_model(**config).to_dict()
        for config in (ARCHS[name].to_hf(), published)
    )
    assert {k: ours.get(k) for k in theirs} == theirs


def test_local_layers_of_gemma2_share_the_rope_base():
    arch = Arch.from_hf(tiny.TINY["gemma2"] | {"rope_theta": 20_000.0})
    assert (arch.rope_base, arch.rope_local_base) == (20_000.0, 20_000.0)
    arch = Arch.from_hf(tiny.TINY["gemma3"] | {"rope_theta": 20_000.0})
    assert (arch.rope_base, arch.rope_local_base) == (20_000.0, 10_000.0)
    with pytest.raises(UserError, match="local layers of gemma2"):
        Arch.from_hf(tiny.TINY["gemma2"] | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}})


LOCAL_FACTOR = {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 4.0}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma4"}, r"gemma4.*did you mean gemma"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_activation": "gelu"}, "hidden_activation.*'gelu', expected 'gelu_pytorch_tanh'"),
        ({"hidden_act": "relu"}, "hidden_act of a gemma3_text model is 'relu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            {
                "rope_parameters": {
                    "full_attention": {},
                    "sliding_attention": {"rope_type": "linear"},
                }
            },
            "'linear' of the local layers",
        ),
        ({"rope_parameters": {"sliding_attention": {"type": "yarn"}}}, "'yarn' of the local"),
        ({"rope_parameters": {"type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        (
            {"model_type": "paligemma", "text_config": tiny.TINY["gemma"]},
            "paligemma.*expected gemma3",
        ),
    ],
)
def test_configs_that_are_refused(change, message):
    config = {k: v for k, v in (tiny.TINY["gemma3"] | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        Arch.from_hf(config)


def test_null_counts_as_absent():
    stated = {"rope_theta": None, "tie_word_embeddings": None}
    for name in ("gemma3", "qwen2"):
        bare = {k: v for k, v in tiny.TINY[name].items() if k not in stated}
        assert Arch.from_hf(bare | stated) == Arch.from_hf(bare)
    null = {"rope_local_base_freq": None}
    assert Arch.from_hf(tiny.TINY["gemma3"] | null).rope_local_base == 10_000.0
    with pytest.raises(UserError, match="lacks hidden_size"):
        Arch.from_hf(tiny.TINY["qwen2"] | {"hidden_size": None})


def test_the_older_spelling_of_a_rope_type_counts_inside_the_newer_one():
    said = {"type": "linear", "factor": 4.0, "rope_theta": 5e4}
    arch = Arch.from_hf(tiny.TINY["qwen2"] | {"rope_parameters": said})
    assert (arch.rope_factor, arch.rope_base) == (4.0, 5e4)


def test_the_outer_config_of_a_multimodal_model_ties_the_head():
    config = {"model_type": "gemma3", "text_config": tiny.TINY["gemma3"]}
    for ties, tied in ((False, False), (None, True), (True, True)):
        assert Arch.from_hf(config | {"tie_word_embeddings": ties}).tied is tied


def test_sliding_qwen_is_refused():
    with pytest.raises(UserError, match="use_sliding_window"):
        Arch.from_hf(tiny.TINY["qwen2"] | {"use_sliding_window": True})


def test_unknown_arch_names_the_nearest():
    with pytest.raises(UserError, match="did you mean gemma3_270m"):
        get_arch("gemma3-270m")


# Imports point up this list: a module imports nothing that stands below it.
ORDER = [
    "errors",
    "files",
    "distributed",
    "arch",
    "sharding",
    "layers",
    "attention",
    "adapters",
    "lora",
    "model",
    "loss",
    "chat",
    "vocabulary",
    "tokenizer",
    "sums",
    "data.scenes",
    "data.generated",
    "data.sources",
    "data.templates",
    "data.packing",
    "data.cache",
    "data.examples",
    "data.dataset",
    "data.pipeline",
    "weights.mapping",
    "weights.hf",
    "weights.gguf",
    "weights.hub",
    "weights.orbax",
    "weights.keras",
    "weights.peft",
    "weights.pretrained",
    "optim",
    "config",
    "compiled",
    "step",
    "workdir",
    "metrics",
    "interrupt",
    "checkpoint",
    "evaluate",
    "stats",
    "decode",
    "generate",
    "rules",
    "traits",
    "confident",
    "explain",
    "review",
    "outliers",
    "report.reading",
    "report.tokens",
    "report.training",
    "report.compare",
    "report.numbers",
    "report.plots",
    "report.sections",
    "report.page",
    "report.prose",
    "report.__main__",
    "manifest",
    "train",
    "hlo",
    "ahead",
    "plan",
    "reopen",
    "export",
    "folds",
    "gradients",
    "unprompted",
]


def test_imports_point_one_way():
    modules = {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts)
        for p in PACKAGE.rglob("*.py")
        if p.name != "__init__.py"
    }
    assert modules == set(ORDER)
    for module in ORDER:
        tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemma_lora"):
                base = node.module.removeprefix("gemma_lora").lstrip(".")
                names = [f"{base}.{a.name}".lstrip(".") for a in node.names] + [base]
            elif isinstance(node, ast.Import):
                names = [
                    a.name.removeprefix("gemma_lora.")
                    for a in node.names
                    if a.name.startswith("gemma_lora.")
                ]
            for name in (n for n in names if n in ORDER):
                assert ORDER.index(name) < ORDER.index(module), f"{module} imports {name}"


def test_the_maths_knows_no_model_by_name():
    maths = "layers attention adapters model lora loss step optim sharding"
    for module in maths.split():
        source = (PACKAGE / f"{module}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and node.value in (*ARCHS, *FAMILIES):
                raise AssertionError(f"{module}.py, line {node.lineno}: {node.value!r}")


def test_abstract_allocates_nothing():
    """The largest model's shapes are known without memory for them."""
    leaves = jax.tree.leaves(Transformer(ARCHS["gemma3_27b"]).abstract()["params"])
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
